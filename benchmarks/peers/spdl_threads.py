"""SPDL: its thread pipeline over files, with its own FFmpeg decoder and with simplejpeg and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import data
import harness
from task import Task, finish, one_thread, random_crop


def spdl(own: bool) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        import spdl.io
        import torch
        from spdl.pipeline import PipelineBuilder

        folder, task = data.files(settings), Task(settings)
        with open(f"{folder}/captions.txt") as file:
            texts = file.read().split("\n")

        if own:
            try:
                spdl.io.demux_image(f"{folder}/000000.jpg")
            except RuntimeError as error:
                raise ImportError("SPDL found no FFmpeg", name="FFmpeg, which SPDL decodes with,") from error

        def decode(i: int) -> tuple[torch.Tensor, str]:
            one_thread()
            with open(f"{folder}/{i:06d}.jpg", "rb") as file:
                encoded = file.read()
            return (by_ffmpeg(encoded) if own else task.image(encoded)), texts[i]

        def by_ffmpeg(encoded: bytes) -> torch.Tensor:
            packets = spdl.io.demux_image(encoded)
            if task.name == "training":
                y, x, h, w = random_crop(packets.height, packets.width)
                what = f"crop={w}:{h}:{x}:{y}:exact=1,scale=224:224:flags=bilinear,format=rgb24"
            else:
                what = "scale=256:256:force_original_aspect_ratio=increase:flags=bilinear,crop=224:224,format=rgb24"
            frames = spdl.io.decode_packets(packets, filter_desc=what)
            pixels = torch.from_numpy(spdl.io.to_numpy(spdl.io.convert_frames(frames))).permute(2, 0, 1)
            return finish(pixels) if task.name == "training" else pixels

        def job() -> Iterator[int]:
            builder = PipelineBuilder().add_source(range(settings.rows))
            builder = builder.pipe(decode, concurrency=data.CORES, output_order="input").aggregate(settings.batch_size)
            builder = builder.pipe(lambda rows: task.batch([row[0] for row in rows], [row[1] for row in rows]))
            pipeline = builder.add_sink(2).build(num_threads=data.CORES + 1, max_failures=0)
            with pipeline.auto_stop():
                yield from pipeline

        return job

    return case


CASES = {"SPDL, its own decoder": spdl(own=True), "SPDL, simplejpeg": spdl(own=False)}
