"""Segmenting a video: every frame, with the colours of its classes laid over it.

    python predict.py ckpt=runs/.../checkpoints/best.ckpt input=street.mp4

    failed = predict_videos({Path("street.mp4"): Path("predictions/street")}, network, predictor)

Frames are read, segmented and written one batch after the other, so that a long video needs no more
memory than a short one. The network sees them upright, as a player shows them, and the result is
written upright. Its frames have the size and the times of the original ones. Sound is left out.

This needs PyAV: pip install -r requirements/video.txt
"""

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fcn.errors import DataError, WriteError, reason
from fcn.figures.legend import draw_legend, legend_entries
from fcn.figures.masks import labels_in, overlay
from fcn.files import atomic_write
from fcn.inference.photos import LEGEND, MARK, OVERLAY_VIDEO, open_video, result_path
from fcn.inference.predictor import OUT_OF_MEMORY, Predictor, save_png
from fcn.inference.tta import TestTime

BT709 = 1  # the number of this colour space in every video format
# Seconds that may be missing at the end of a video that is not damaged: some files do not say how
# long their last frame is shown.
SHORT = 0.5


def predict_videos(
    jobs: Mapping[Path, Path], network: TestTime, predictor: Predictor, *, batch_size: int = 1
) -> dict[Path, str]:
    """Write the overlay of each video, and a legend of the classes that occur in it.

    Args:
        jobs: videos, and the target of each.
        network: predicts the mask of each frame.
        predictor: has the names and the colours of the classes.
        batch_size: frames in a batch.

    Returns:
        The videos that could not be read, segmented or written, and why. No file is left of these.
    """
    if not jobs:
        return {}
    from av import FFmpegError

    failed: dict[Path, str] = {}
    for path, target in jobs.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            done = _predict_video(path, target, network, predictor, batch_size)
            print(f"{path}: {done}")
        except FFmpegError as error:
            failed[path] = error.strerror or reason(error)
        except (DataError, OSError, WriteError) as error:  # the caller names the file
            failed[path] = reason(error.__cause__ or error)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            failed[path] = OUT_OF_MEMORY
    return failed


def _predict_video(
    path: Path, target: Path, network: TestTime, predictor: Predictor, batch_size: int
) -> str:
    """Write the overlay of one video, and say in a few words what was done."""
    import av

    started, number, labels = time.perf_counter(), 0, set[int]()
    result_file = result_path(target, OVERLAY_VIDEO)
    with open_video(path) as source, atomic_write(result_file) as part:
        _check(source, predictor)
        stream = source.streams.video[0]
        frames = _upright(source, stream)
        bar = tqdm(total=stream.frames or None, desc=path.name, unit="frame")
        with av.open(str(part), "w", format="mp4") as result, bar:
            result.metadata["comment"] = MARK
            output = None
            while batch := list(islice(frames, batch_size)):
                with torch.inference_mode():
                    masks = network.masks(torch.stack([image for image, _ in batch]))  # (N, H, W)
                for (image, moment), mask in zip(batch, masks, strict=True):
                    picture = overlay(image, mask, predictor.colours)  # (3, H, W)
                    output = output or _add_output(result, stream, *picture.shape[1:])
                    frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).numpy())
                    frame = frame.reformat(format=output.pix_fmt, dst_colorspace=BT709)
                    frame.pts, frame.time_base = moment, stream.time_base
                    result.mux(output.encode(frame))
                    labels.update(labels_in(mask))
                number += len(batch)
                bar.update(len(batch))
            if output is None:
                raise DataError("it has no frames")
            result.mux(output.encode(None))
        # The legend comes first: if it cannot be written, no video is left either.
        entries = legend_entries(labels, predictor.class_names, predictor.colours)
        save_png(draw_legend(entries, width=640), result_path(target, LEGEND))
        sound = "; its sound was left out" if source.streams.audio else ""
    speed = number / (time.perf_counter() - started)
    return f"{number} frames, {speed:.2f} a second{sound}; see {result_file}"


def _check(source: Any, predictor: Predictor) -> None:
    """Refuse what has no picture, and a network that was trained on other values than a video's."""
    if not source.streams.video:
        raise DataError("it has no picture, only sound")
    kind, value_range = predictor.image_type or "8-bit", predictor.value_range
    if kind != "8-bit" or tuple(value_range or (0, 255)) != (0, 255):
        raise DataError(
            "frames have values from 0 to 255, and the network was trained on images of "
            f"{kind}, value_range={value_range}"
        )


def _decode(source: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream.

    Raises:
        DataError: the file is damaged, or is cut. FFmpeg would go on, or end without a word.
    """
    end = 0.0  # of the last frame, sound or subtitle: the length of a file is that of the longest
    for packet in source.demux():
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream:
            for frame in packet.decode():
                if packet.is_corrupt or frame.is_corrupt:
                    when = f"{frame.time or 0:.2f} seconds"
                    raise DataError(f"it is damaged or cut at {when}; copy or save it again")
                yield frame
    # Other formats do not say how long they are.
    if source.format.name == "avi":
        length = float(stream.frames / (stream.average_rate or 25))
    elif source.format.name.startswith(("matroska", "mov")):  # "matroska,webm", "mov,mp4,..."
        length = (source.duration or 0) / 1e6
    else:
        length = 0.0
    if end < length - SHORT:
        raise DataError(
            f"it is damaged or cut, and ends after {end:.2f} of {length:.2f} seconds; copy it again"
            " or save it as MP4"
        )


def _upright(source: Any, stream: Any) -> Iterator[tuple[Tensor, int]]:
    """The frames (3, H, W) uint8, turned as the file asks for, and the time of each.

    Times are in units of the stream's `time_base`, and grow, as the result needs. Where they do not
    (an AVI has no times for B-frames), a frame comes at the usual distance from the one before.
    """
    first, moment = None, None
    step = max(1, round(1 / ((stream.average_rate or 25) * stream.time_base)))
    for frame in _decode(source, stream):
        pixels = frame.to_ndarray(format="rgb24")  # (H, W, 3)
        first = first or pixels.shape
        if pixels.shape != first:
            sizes = " and ".join(f"{width}×{height}" for height, width, _ in (first, pixels.shape))
            raise DataError(f"its frames are of several sizes, {sizes}")
        turned = np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))
        if moment is None:
            moment = frame.pts or 0
        else:
            moment = moment + step if frame.pts is None or frame.pts <= moment else frame.pts
        yield torch.from_numpy(turned).permute(2, 0, 1), moment


def _add_output(result: Any, stream: Any, height: int, width: int) -> Any:
    """The stream of a result, with the size of the upright frames and the times of the original.

    In H.264, usual players need colours at half the resolution, but then both sides are even.
    """
    even = height % 2 == 0 and width % 2 == 0
    quality = {"crf": "18"}  # borders of classes stay sharp
    output = result.add_stream("libx264", rate=stream.average_rate or 25, options=quality)
    output.width, output.height = width, height
    output.pix_fmt = "yuv420p" if even else "yuv444p"
    output.codec_context.time_base = stream.time_base
    ratio = stream.sample_aspect_ratio  # width of a pixel by its height; None: not known
    if ratio:
        turned = (stream.width, stream.height) != (width, height)
        output.codec_context.sample_aspect_ratio = 1 / ratio if turned else ratio
    output.codec_context.colorspace = BT709
    return output
