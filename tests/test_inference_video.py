"""predict.py with a video: its size, times and rotation stay, and nothing half written is left."""

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_config
from PIL import Image
from test_predict import noise, write_checkpoint

from fcn.cli import quoted
from fcn.errors import ConfigError, DataError
from fcn.figures.masks import overlay
from fcn.inference.photos import find_photos, open_video
from fcn.inference.predictor import load_predictor
from fcn.inference.tta import TestTime
from fcn.inference.video import _upright
from predict import predict

av = pytest.importorskip("av")


def write_video(
    path: Path, *, height: int = 48, width: int = 64, frames: int = 5, **more: Any
) -> list[int]:
    """Frames of noise whose times are uneven, as a telephone's are; the times in 1/600 s."""
    moments = [0, 20, 40, 65, 85, 110, 130][:frames]
    with av.open(str(path), "w") as file:
        codec = "ffv1" if path.suffix == ".mkv" else "libx264"
        stream = file.add_stream(codec, rate=30)
        stream.height, stream.width = height, width
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv444p"
        stream.codec_context.time_base = Fraction(1, 600)
        if "rotation" in more:
            stream.set_display_rotation(more["rotation"])
        sound = file.add_stream("aac", rate=8000) if more.get("sound") else None
        for number, moment in enumerate(moments):
            pixels = noise(height, width, more.get("seed", number))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 600)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound:
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.rate = 8000
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            file.mux(sound.encode(silence))
            file.mux(sound.encode(None))
    return moments


def read_video(path: Path) -> tuple[np.ndarray, list[Fraction]]:
    """Frames (T, H, W, 3) uint8 and the second of each. There is no sound, and no rotation."""
    with av.open(str(path)) as file:
        assert [stream.type for stream in file.streams] == ["video"]
        frames = list(file.decode(video=0))
    assert {frame.rotation for frame in frames} == {0}
    times = [frame.pts * frame.time_base for frame in frames]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), times


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("video") / "best.ckpt")


def run(ckpt: Path, video: Path, output: Path, *overrides: str) -> Path:
    settings = [f"ckpt={ckpt}", f"input={video}", f"output={output}", "device=cpu", *overrides]
    return predict(compose_config("predict", *map(quoted, settings)))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 65)])
def test_frames(
    tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str], height: int, width: int
) -> None:
    """Each frame is what `overlay` makes of it, up to the losses of the codec."""
    moments = write_video(tmp_path / "a.mkv", height=height, width=width)
    run(ckpt, tmp_path / "a.mkv", tmp_path / "out", "batch_size=2", "tta.flip=true", "tile=64")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a_legend.png",
        "a_overlay.mp4",
    ]
    found, times = read_video(tmp_path / "out" / "a_overlay.mp4")
    assert found.shape == (5, height, width, 3)
    # Matroska rounds times to milliseconds.
    assert [float(t) for t in times] == pytest.approx([m / 600 for m in moments], abs=0.001)
    predictor = load_predictor(ckpt, "cpu")
    network = TestTime(predictor.scores, flip=True, tile=64)
    for number, frame in enumerate(found):
        image = torch.from_numpy(noise(height, width, number).copy()).permute(2, 0, 1)
        with torch.inference_mode():
            (mask,) = network.masks(image[None])
        assert len(mask.unique()) > 1
        expected = overlay(image, mask, predictor.colours).permute(1, 2, 0).numpy()
        assert np.median(np.abs(frame.astype(int) - expected)) < 8
    printed = capsys.readouterr()
    assert "a.mkv: 5 frames, " in printed.out
    assert "sound" not in printed.out
    assert "a.mkv: 5frame [" in printed.err  # the progress bar; Matroska does not say how many


@pytest.mark.slow
def test_a_turned_video_with_sound(
    tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A player turns the frames of the original, and so does the network's own reader."""
    video = tmp_path / os.fsdecode(b"turned \xfc=(1),.mp4")  # a name that is not UTF-8
    write_video(video, seed=0, frames=2, rotation=90, sound=True)
    Image.fromarray(np.rot90(noise(48, 64))).save(tmp_path / "upright.png")
    run(ckpt, video, tmp_path / "out")
    run(ckpt, tmp_path / "upright.png", tmp_path / "out")
    frames, _ = read_video(tmp_path / "out" / f"{video.stem}_overlay.mp4")
    expected = np.asarray(Image.open(tmp_path / "out" / "upright_overlay.jpg"))[:64, :48]
    assert frames.shape == (2, 64, 48, 3)
    assert np.median(np.abs(frames[0].astype(int) - expected)) < 8
    assert "2 frames, " in (printed := capsys.readouterr().out)
    assert "; its sound was left out; see " in printed


def test_a_folder_with_photographs_and_videos(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged video is one line, and the rest is done. Results are no input of the next run."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "a.mp4", frames=2)
    Image.fromarray(noise(20, 30)).save(folder / "a.png")
    (folder / "bad.mp4").write_bytes((folder / "a.mp4").read_bytes()[:500])
    with pytest.raises(DataError, match=r"1 of 3 files failed:\n  .*bad\.mp4: Invalid") as error:
        run(ckpt, folder, folder)
    assert len(str(error.value).splitlines()) == 2
    made = {path.name for path in folder.iterdir()} - {"a.mp4", "a.png", "bad.mp4"}
    made_of_video = {"a.mp4_overlay.mp4", "a.mp4_legend.png"}
    assert made == {"a.png.png", "a.png_overlay.jpg"} | made_of_video
    jobs, left_out = find_photos(str(folder), folder)
    assert {path.name for path in jobs} == {"a.mp4", "a.png", "bad.mp4"}
    assert {path.name for path in left_out} == made
    monkeypatch.setitem(sys.modules, "av", None)
    jobs, left_out = find_photos(str(folder), tmp_path / "out")
    assert {path.name for path in jobs} == {"a.png"}
    assert left_out[folder / "a.mp4"] == "a video needs pip install -r requirements/video.txt"
    with pytest.raises(ConfigError, match=r"^av is not installed: pip install -r requirements/vid"):
        run(ckpt, folder / "a.mp4", tmp_path / "out")


def write_damaged(path: Path, codec: str, share: float = 1, **options: str) -> Path:
    """30 frames at 25 a second, of which only a share of the bytes is left.

    An MP4 has its index in front, as in downloads: without its index, nothing can be read of one.
    """
    index = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=index) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(noise(48, 64, number).copy(), format="rgb24")
            file.mux(stream.encode(frame.reformat(format="yuv420p")))
        file.mux(stream.encode(None))
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    return path


def decoded(path: Path) -> list[int]:
    """The times of all frames, as predict.py reads them."""
    with open_video(path) as source:
        return [moment for _, moment in _upright(source, source.streams.video[0])]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx"),
        ("a.avi", "mpeg4"),
        ("a.mpg", "mpeg2video"),
        ("a.mp4", "libx264"),
    ],
)
def test_a_cut_video_is_damaged(tmp_path: Path, name: str, codec: str) -> None:
    """FFmpeg shows what is left of it, and says nothing."""
    assert len(decoded(write_damaged(tmp_path / name, codec))) == 30
    if name != "a.mp4":
        with pytest.raises(DataError, match="it is damaged or cut"):
            decoded(write_damaged(tmp_path / name, codec, 0.5))
        return
    path = write_damaged(tmp_path / name, codec, g="10")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(av.FFmpegError, match="Invalid data"):
        decoded(path)


def test_a_cut_between_two_frames(tmp_path: Path) -> None:
    """FFmpeg meets no frame that is not complete."""
    path = write_damaged(tmp_path / "a.mp4", "libx264", g="10", bf="0")
    assert len(decoded(path)) == 30
    with av.open(str(path)) as file:
        ends = [packet.pos for packet in file.demux(video=0) if packet.pos]
    path.write_bytes(path.read_bytes()[: ends[12]])
    with pytest.raises(DataError, match=r"ends after 0\.4\d of 1\.20 seconds"):
        decoded(path)


def test_sound_may_be_longer_than_the_picture(tmp_path: Path) -> None:
    """The length of a Matroska is that of the longest stream, from 0 on."""
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream, sound = file.add_stream("ffv1", rate=25), file.add_stream("aac", rate=8000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        frame = av.VideoFrame.from_ndarray(noise(48, 64).copy(), format="rgb24")
        frame.pts, frame.time_base = 50, Fraction(1, 25)
        file.mux(stream.encode(frame.reformat(format="bgr0")))
        file.mux(stream.encode(None))
        for number in range(40):
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.rate, silence.pts = 8000, 1024 * number
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            file.mux(sound.encode(silence))
        file.mux(sound.encode(None))
    assert len(decoded(tmp_path / "a.mkv")) == 1


def test_times_of_b_frames_in_avi(tmp_path: Path, ckpt: Path) -> None:
    """AVI does not have them, and FFmpeg's guesses do not grow."""
    path = write_damaged(tmp_path / "a.avi", "libx264", bf="3", b_strategy="0")
    with av.open(str(path)) as file:
        guesses = [frame.pts for frame in file.decode(video=0)]
    times = decoded(path)
    assert sorted(guesses) != guesses
    assert times == sorted(set(times))
    assert times[-1] - times[0] < 33
    run(ckpt, path, tmp_path / "out")
    assert len(read_video(tmp_path / "out" / "a_overlay.mp4")[0]) == 30


@pytest.mark.slow
def test_what_cannot_be_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of a video that was interrupted, has no frames, or needs another network."""
    write_video(tmp_path / "a.mp4")
    deep = write_checkpoint(tmp_path / "deep.ckpt", image_type="16-bit")
    with pytest.raises(DataError, match="frames have values from 0 to 255, and the network was tr"):
        run(deep, tmp_path / "a.mp4", tmp_path / "out")
    ckpt = write_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")  # opens other files
    for name in ("empty.mp4", "list.mp4"):
        with pytest.raises(DataError, match=f"{name}: Invalid (data found|argument)"):
            run(ckpt, tmp_path / name, tmp_path / "out")
    calls = []

    def interrupt(self: TestTime, image: torch.Tensor) -> torch.Tensor:
        calls.append(image)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return image[:, 0]

    monkeypatch.setattr(TestTime, "masks", interrupt)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(ckpt, tmp_path / "a.mp4", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
