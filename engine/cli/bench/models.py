"""`recall bench` of learnt channels: their search, and training beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine import console
from engine.cli.bench.shared import LARGEST, show_where
from engine.cli.common import ConfigOption
from engine.cli.measuring import DataArgument, JsonOption, ThreadsOption, configured, print_json
from engine.core.errors import ConfigError


def bench_ann(
    items: Annotated[int, typer.Option(min=1000, max=LARGEST, help="Made-up vectors.")] = 1_000_000,
    dimension: Annotated[int, typer.Option(min=2, max=4096, help="Of the made-up vectors.")] = 64,
    vectors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own instead: a .npy of float32[items, dimension]."),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What they are asked for: a .npy like it.")
    ] = None,
    asked: Annotated[int, typer.Option(min=8, max=100_000, help="Queries, where no file has them.")] = 500,
    k: Annotated[int, typer.Option(min=1, max=10_000, help="Neighbours asked for.")] = 200,
    kinds: Annotated[
        str, typer.Option(help="Kinds of index, with commas between them.")
    ] = "hnsw,hnsw_faiss,ivf_int8,ivf_flat,ivf_pq,exact",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the index, as m=32.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="How often the queries are timed.")] = 3,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the kinds of vector index: what they find, and the CPU time of a query alone and in a batch of 8."""
    from engine.bench import ann
    from engine.offline.build import usable_cores

    names = ann.kinds_of(kinds)
    options = ann.options_of(option or [])
    if queries is not None and vectors is None:
        raise ConfigError("means nothing without --vectors", "--queries")
    if vectors is None:
        corpus, questions = ann.made_up_vectors(items, dimension, asked)
    else:
        corpus = ann.read_vectors(vectors, "--vectors")
        questions = (
            ann.queries_near(corpus, asked) if queries is None else ann.read_vectors(queries, "--queries")
        )
    with console.BuildProgress() as progress:
        report = ann.bench_ann(
            corpus, questions, names, options, k, threads or usable_cores(), progress, repetitions
        )
    report["vectors"] = "made up" if vectors is None else vectors.name
    if as_json:
        print_json(report)
        return
    headings = ("recall", "of the worst 20th", "µs alone", "µs of 8", "build s", "bytes")
    rows = console.table("index", "setting", *((each, "right") for each in headings))
    for row in report["rows"]:
        setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
        numbers = [f"{row[key]:.4f}" for key in ("recall", "recall_p5")]
        numbers += [f"{row[key]:,.0f}" for key in ("batch1_us", "batch8_us")]
        rows.add_row(row["kind"], setting, *numbers, f"{row['build_s']:,.1f}", console.size(row["bytes"]))
    console.output().print(rows)
    words = (
        f"{report['items']:,} vectors of {report['dimension']} dimensions ({report['vectors']}), "
        f"{report['queries']:,} queries for {report['k']:,}; bytes are without the vectors; "
        f"built with {console.counted(report['threads'], 'thread')}"
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    show_where(report)


def bench_deep_retrieval(
    items: Annotated[int, typer.Option(min=1000, max=LARGEST, help="Made-up items.")] = 1_480_000,
    width: Annotated[int, typer.Option(min=2, max=65_536, help="K, nodes of a layer.")] = 100,
    depth: Annotated[int, typer.Option(min=1, max=62, help="D, layers.")] = 3,
    beam: Annotated[int, typer.Option(min=1, max=10_000, help="B, paths searched.")] = 50,
    dimension: Annotated[int, typer.Option(min=1, max=4096, help="Of the user's vector.")] = 64,
    hidden: Annotated[int, typer.Option(min=0, max=65_536, help="Hidden units of a layer; 0: none.")] = 64,
    reached: Annotated[int, typer.Option(min=1, max=LARGEST, help="Items on a user's paths, about.")] = 1500,
    k: Annotated[int, typer.Option(min=1, max=10_000, help="Items asked for.")] = 200,
    asked: Annotated[int, typer.Option(min=8, max=100_000, help="Queries.")] = 400,
    repetitions: Annotated[int, typer.Option(min=1, help="How often they are timed.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Time the search of paths and the ranker, of random weights, against comparing every item; on one core."""
    from engine.bench import deep_retrieval

    with console.BuildProgress() as progress:
        report = deep_retrieval.bench_deep_retrieval(
            items, width, depth, beam, dimension, (hidden,) if hidden else (), reached, k, asked, repetitions, progress
        )  # fmt: skip
    if as_json:
        print_json(report)
        return
    headings = ("beam", "lists and ranker", "both", "tower besides", "all items", "times")
    rows = console.table("batch", *((each, "right") for each in headings))
    for row in report["rows"]:
        parts = [f"{row[f'{name}_us']:,.0f}" for name in ("beam", "gather", "search", "tower", "brute")]
        rows.add_row(str(row["batch"]), *parts, f"{row['ratio']:,.1f}")
    console.output().print(rows)
    words = (
        f"CPU microseconds of a request; {report['items']:,} items on {report['paths']:,} of "
        f"{report['width']}^{report['depth']} paths, a beam of {report['beam']}, which reaches "
        f"{report['reached']:,.0f} entries, {report['k']:,} asked for"
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    show_where(report)


def bench_streaming_vq(
    items: Annotated[int, typer.Option(min=1000, max=LARGEST, help="Made-up items.")] = 1_000_000,
    clusters: Annotated[int, typer.Option(min=2, max=1_048_576, help="K.")] = 16_384,
    rank_list: Annotated[int, typer.Option(min=1, max=1_000_000, help="Items that are ranked.")] = 5000,
    dimension: Annotated[int, typer.Option(min=1, max=4096, help="Of the clusters' vectors.")] = 64,
    rank: Annotated[str, typer.Option(metavar="KIND", help="none, two_tower or complex.")] = "two_tower",
    rank_dimension: Annotated[int, typer.Option(min=1, max=1024, help="Of the ranking step's vectors.")] = 32,
    k: Annotated[int, typer.Option(min=1, max=10_000, help="Items asked for.")] = 200,
    asked: Annotated[int, typer.Option(min=8, max=100_000, help="Queries.")] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="How often they are timed.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Time streaming VQ of random weights, as built and after every item has moved, and say what an item takes."""
    from engine.bench import streaming_vq

    if rank not in ("none", "two_tower", "complex"):
        raise ConfigError(f"expected none, two_tower or complex, got {rank!r}", "--rank")
    with console.BuildProgress() as progress:
        report = streaming_vq.bench_streaming_vq(
            items, clusters, rank_list, dimension, rank, rank_dimension, k, asked, repetitions, progress
        )
    if as_json:
        print_json(report)
        return
    headings = ("scores", "merge", "rank", "all three", "tower besides", "sorting all", "times")
    rows = console.table("lists", "batch", *((each, "right") for each in headings))
    for row in report["rows"]:
        parts = [f"{row[f'{name}_us']:,.0f}" for name in ("scores", "merge", "rank", "search", "tower")]
        sorting = [f"{row['sort_us']:,.0f}", f"{row['ratio']:,.0f}"] if "ratio" in row else ["", ""]
        rows.add_row(row["lists"], str(row["batch"]), *parts, *sorting)
    console.output().print(rows)
    memory = report["memory"]
    larger = memory["larger"]
    words = (
        f"CPU microseconds of a request; {report['items']:,} items in {report['clusters']:,} clusters, "
        f"{report['rank_list']:,} ranked, {report['k']:,} asked for. An assignment takes {report['assign_us']:.2f} us. "
        f"Bytes an item: {memory['index']:g} to be found, {sum(memory['mapped'].values()) - memory['index']:g} to be "
        f"ranked, {sum(memory['own'].values()):.1f} of a worker's own once it has moved; {larger['items']:,} items take "
        f"{larger['index_gib']:g}, {larger['ranking_gib']:g} and {larger['own_gib']:g} GiB."
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    show_where(report)


def bench_sasrec(
    directory: DataArgument,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the log.")] = 5,
    rectools_python: Annotated[
        str | None, typer.Option(metavar="FILE", help="An interpreter that has rectools[torch].")
    ] = None,
    width: Annotated[int, typer.Option(min=1, max=4096, help="Of vectors and layers.")] = 64,
    blocks: Annotated[int, typer.Option(min=1, max=64, help="Blocks of attention.")] = 2,
    heads: Annotated[int, typer.Option(min=1, max=64, help="Heads of each.")] = 2,
    length: Annotated[int, typer.Option(min=1, max=4096, help="Newest items that are read.")] = 200,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Inside the layers.")] = 0.2,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST, help="Users per step.")] = 128,
    rate: Annotated[float, typer.Option(min=0, max=1, help="Step size.")] = 0.001,
    seed: Annotated[int, typer.Option(min=0, help="Of both trainings.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of each training.")] = 1,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train SASRec on all but each user's newest item, beside RecTools' SASRecModel, and look for that item."""
    from engine.bench.sasrec import Settings, bench_sasrec

    settings = Settings(width, blocks, heads, length, dropout, batch, rate, epochs, seed)
    with console.BuildProgress() as progress:
        report = bench_sasrec(
            configured(config, None), directory, settings, rectools_python, threads, progress
        )
    if as_json:
        print_json(report)
        return
    names = [("HR@10", "hr", ".4f"), ("NDCG@10", "ndcg", ".4f"), ("CPU s", "cpu_s", ",.1f")]
    names += [("CPU s an epoch", "cpu_s_per_epoch", ",.2f"), ("wall s", "wall_s", ",.1f")]
    rows = console.table("", *((title, "right") for title, _, _ in names))
    for who in ("recall_engine", "rectools"):
        if who in report:
            rows.add_row(who, *(f"{report[who][key]:{form}}" for _, key, form in names))
    console.output().print(rows)
    words = ", ".join(f"{name} {value:g}" for name, value in report["settings"].items())
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    show_where(report)
