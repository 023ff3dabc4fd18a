"""`recall bench`: measure this machine. Each command prints a table, or one JSON object with `--json`."""

from __future__ import annotations

import typer

from engine.cli.bench.building import bench_build, bench_mstep, bench_scaling
from engine.cli.bench.models import bench_ann, bench_deep_retrieval, bench_sasrec, bench_streaming_vq
from engine.cli.bench.serving import bench_exposure, bench_memory_, bench_pipeline, bench_serve
from engine.cli.bench.state import bench_ingest_, bench_live, bench_state
from engine.cli.path_sweeps import bench_path_sweeps
from engine.cli.vq_quality import bench_vq_drift, bench_vq_quality

app = typer.Typer(help="Measure building and answering on this machine.", no_args_is_help=True)
app.command("build")(bench_build)
app.command("pipeline")(bench_pipeline)
app.command("serve")(bench_serve)
app.command("memory")(bench_memory_)
app.command("ingest")(bench_ingest_)
app.command("scaling")(bench_scaling)
app.command("exposure")(bench_exposure)
app.command("state")(bench_state)
app.command("live")(bench_live)
app.command("ann")(bench_ann)
app.command("deep-retrieval")(bench_deep_retrieval)
app.command("streaming-vq")(bench_streaming_vq)
app.command("sasrec")(bench_sasrec)
app.command("mstep")(bench_mstep)
app.command("deep-retrieval-sweeps")(bench_path_sweeps)
app.command("streaming-vq-quality")(bench_vq_quality)
app.command("streaming-vq-drift")(bench_vq_drift)
