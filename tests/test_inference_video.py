"""predict.py with a video: its size, times and rotation stay, and nothing half written is left."""

import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_config
from PIL import Image
from test_predict import noise, write_checkpoint

from fcn.cli import quoted, short_messages
from fcn.errors import ConfigError, DataError
from fcn.figures.masks import overlay
from fcn.inference.photos import find_photos, open_video
from fcn.inference.predictor import load_predictor
from fcn.inference.tta import TestTime
from fcn.inference.video import _upright
from predict import predict

av = pytest.importorskip("av")


def write_video(
    path: Path,
    codec: str = "libx264",
    size: tuple[int, int] = (48, 64),
    moments: Sequence[int] = (),
    sound: int = 0,
    rotation: int = 0,
    pixel_ratio: Fraction | None = None,
    **options: str,
) -> Path:
    """A video of noise. An MP4 has its index in front, as in downloads.

    Args:
        size: height and width.
        moments: the times of frames in 1/600 s; without, there are 30 frames at 25 a second.
        sound: how many blocks of silence there are, 0.128 s each.
        pixel_ratio: the width of a pixel by its height.
        options: of the codec.
    """
    index = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=index) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p" if codec.startswith("mpeg") else "yuv444p"
        stream.set_display_rotation(rotation)
        if pixel_ratio:
            stream.codec_context.sample_aspect_ratio = pixel_ratio
        if moments:
            stream.codec_context.time_base = Fraction(1, 600)
        silent = file.add_stream("aac", rate=8000) if sound else None
        for number, moment in enumerate(moments or range(0, 720, 24)):
            frame = av.VideoFrame.from_ndarray(noise(*size, number).copy(), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 600)
            file.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        file.mux(stream.encode(None))
        for number in range(sound):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            block.rate, block.pts = 8000, 1024 * number
            file.mux(silent.encode(block))
        if silent:
            file.mux(silent.encode(None))
    return path


def read_video(path: Path) -> tuple[np.ndarray, list[float]]:
    """Frames (T, H, W, 3) uint8 and the second of each. There is no sound, and no rotation."""
    with av.open(str(path)) as file:
        assert [stream.type for stream in file.streams] == ["video"]
        frames = list(file.decode(video=0))
    assert {frame.rotation for frame in frames} == {0}
    pixels = [frame.to_ndarray(format="rgb24") for frame in frames]
    return np.stack(pixels), [frame.time for frame in frames]


def decoded(path: Path) -> list[int]:
    """The times of all frames, as predict.py reads them."""
    with open_video(path) as source:
        return [moment for _, moment in _upright(source, source.streams.video[0])]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("video") / "best.ckpt")


def run(ckpt: Path, video: Path, output: Path, *overrides: str) -> Path:
    settings = [f"ckpt={ckpt}", f"input={video}", f"output={output}", "device=cpu", *overrides]
    return predict(compose_config("predict", *map(quoted, settings)))


@pytest.mark.parametrize("size", [(48, 64), (47, 65)])
def test_frames(
    tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int]
) -> None:
    """Each frame is what `overlay` makes of it, up to the losses of the codec. Their times are
    uneven, as a telephone's are."""
    moments = [0, 20, 40, 65, 85]
    video = write_video(tmp_path / "a.mkv", "ffv1", size, moments)
    output = run(ckpt, video, tmp_path / "out", "batch_size=2", "tta.flip=true", "tile=64")
    assert {path.name for path in output.iterdir()} == {"a_legend.png", "a_overlay.mp4"}
    found, times = read_video(output / "a_overlay.mp4")
    assert found.shape == (5, *size, 3)
    # Matroska rounds times to milliseconds.
    assert times == pytest.approx([moment / 600 for moment in moments], abs=0.001)
    predictor = load_predictor(ckpt, "cpu")
    network = TestTime(predictor.scores, flip=True, tile=64)
    for number, frame in enumerate(found):
        image = torch.from_numpy(noise(*size, number).copy()).permute(2, 0, 1)
        with torch.inference_mode():
            (mask,) = network.masks(image[None])
        assert len(mask.unique()) > 1
        expected = overlay(image, mask, predictor.colours).permute(1, 2, 0).numpy()
        assert np.median(np.abs(frame.astype(int) - expected)) < 8
    printed = capsys.readouterr()
    assert "a.mkv: 5 frames, " in printed.out
    assert "sound" not in printed.out
    assert "a.mkv: 5frame [" in printed.err  # the progress bar; Matroska does not say how many


@pytest.mark.parametrize(("rotation", "expected"), [(0, (16, 11)), (90, (11, 16))])
def test_pixels_that_are_no_squares(
    rotation: int, expected: tuple[int, int], tmp_path: Path, ckpt: Path
) -> None:
    """As on a DVD: a player shows the result as wide as the original."""
    video = tmp_path / "a.mp4"
    write_video(video, moments=[0, 20], rotation=rotation, pixel_ratio=Fraction(16, 11))
    with av.open(str(run(ckpt, video, tmp_path / "out") / "a_overlay.mp4")) as file:
        assert file.streams.video[0].sample_aspect_ratio == Fraction(*expected)


def test_a_turned_video_with_sound(
    tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A player turns the frames of the original, and so does the network's own reader."""
    video = tmp_path / os.fsdecode(b"turned \xfc=(1),.mp4")  # a name that is not UTF-8
    write_video(video, moments=[0, 20], rotation=90, sound=1)
    Image.fromarray(np.rot90(noise(48, 64))).save(tmp_path / "upright.png")
    for path in (video, tmp_path / "upright.png"):
        with short_messages():  # as in main(): the name is printed, whatever is in it
            run(ckpt, path, tmp_path / "out")
    frames, _ = read_video(tmp_path / "out" / f"{video.stem}_overlay.mp4")
    expected = np.asarray(Image.open(tmp_path / "out" / "upright_overlay.jpg"))[:64, :48]
    assert frames.shape == (2, 64, 48, 3)
    assert np.median(np.abs(frames[0].astype(int) - expected)) < 8
    assert "; its sound was left out; see " in capsys.readouterr().out


def test_a_folder_with_photographs_and_videos(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged video is one line, and the rest is done. Results are no input of the next run."""
    folder = tmp_path / "in"
    folder.mkdir()
    video, photo, bad = (folder / name for name in ("a.mp4", "a.png", "bad.mp4"))
    bad.write_bytes(write_video(video, moments=[0, 20]).read_bytes()[:500])
    Image.fromarray(noise(20, 30)).save(photo)
    with pytest.raises(DataError, match=r"1 of 3 files failed:\n  .*bad\.mp4: \w.*\Z"):
        run(ckpt, folder, folder)
    jobs, left_out = find_photos(str(folder), folder)
    assert set(jobs) == {video, photo, bad}
    names = {"a.mp4_overlay.mp4", "a.mp4_legend.png", "a.png.png", "a.png_overlay.jpg"}
    assert {path.name for path in left_out} == names
    monkeypatch.setitem(sys.modules, "av", None)
    jobs, left_out = find_photos(str(folder), tmp_path / "out")
    assert set(jobs) == {photo}
    assert left_out[video] == "a video needs pip install -r requirements/video.txt"
    with pytest.raises(ConfigError, match=r"^av is not installed: pip install -r requirements/vid"):
        run(ckpt, video, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg2video")]
)
def test_a_cut_video_is_damaged(tmp_path: Path, name: str, codec: str) -> None:
    """FFmpeg shows what is left of it, and says nothing."""
    path = write_video(tmp_path / name, codec)
    assert len(decoded(path)) == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="it is damaged or cut"):
        decoded(path)


def test_a_cut_mp4(tmp_path: Path) -> None:
    """In a frame, or between two of them, where FFmpeg meets no frame that is not complete."""
    path = write_video(tmp_path / "a.mp4", g="10", bf="0")
    assert len(decoded(path)) == 30
    with av.open(str(path)) as file:
        ends = [packet.pos for packet in file.demux(video=0) if packet.pos]
    path.write_bytes(path.read_bytes()[: ends[12]])
    with pytest.raises(DataError, match=r"ends after 0\.4\d of 1\.20 seconds"):
        decoded(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(av.FFmpegError, match="Invalid data"):
        decoded(path)


def test_sound_may_be_longer_than_the_picture(tmp_path: Path) -> None:
    """The length of a Matroska is that of the longest stream, from 0 on."""
    path = write_video(tmp_path / "a.mkv", "ffv1", moments=[1200], sound=40)
    assert len(decoded(path)) == 1


@pytest.mark.slow
def test_times_of_b_frames_in_avi(tmp_path: Path, ckpt: Path) -> None:
    """AVI does not have them, and FFmpeg's guesses do not grow."""
    path = write_video(tmp_path / "a.avi", bf="3", b_strategy="0")
    with av.open(str(path)) as file:
        guesses = [frame.pts for frame in file.decode(video=0)]
    times = decoded(path)
    assert sorted(guesses) != guesses
    assert times == sorted(set(times))
    assert times[-1] - times[0] < 33
    run(ckpt, path, tmp_path / "out")
    assert len(read_video(tmp_path / "out" / "a_overlay.mp4")[0]) == 30


def test_what_cannot_be_a_result(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of a video that was interrupted, has no frames, or needs another network."""
    deep = write_checkpoint(tmp_path / "deep.ckpt", image_type="16-bit")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")  # opens other files
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "a.mp4", moments=range(5))
    output = tmp_path / "out"
    output.mkdir()
    for network, name, message in (
        (deep, "a.mp4", "frames have values from 0 to 255, and the network was trained on"),
        (ckpt, "empty.mp4", "empty.mp4: Invalid (data found|argument)"),
        (ckpt, "list.mp4", "list.mp4: Invalid (data found|argument)"),
    ):
        with pytest.raises(DataError, match=message):
            run(network, tmp_path / name, output)
    batches: list[torch.Tensor] = []

    def interrupt(self: TestTime, image: torch.Tensor) -> torch.Tensor:
        batches.append(image)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return image[:, 0]

    monkeypatch.setattr(TestTime, "masks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(ckpt, tmp_path / "a.mp4", output)
    assert list(output.iterdir()) == []
