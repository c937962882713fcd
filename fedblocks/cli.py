"""The command line: every verb, each importing its room only when it is called.

``fedblocks --help`` and the aggregator's verbs start without torch and without transformers.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from fedblocks import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of language models by block expansion, on unequal edge hardware, without forgetting.",
    epilog="Exit codes: 0 done; 2 usage or configuration; 3 cannot reach the peer; 4 refused; 5 does not fit this "
    "device; 6 data error; 7 interrupted, resumable.",
)
keys_app = typer.Typer(no_args_is_help=True, help="Which client keys may take part in a run.")
app.add_typer(keys_app, name="keys")

EXIT_USAGE = 2
EXIT_INTERRUPTED = 7

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="the run folder that `fedblocks init` made")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override a key of run.toml; repeatable")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="print JSON")]
ModelOption = Annotated[Path, typer.Option("--model", metavar="DIR", help="the base model: a Hugging Face folder")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"fedblocks {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    pass


@app.command(epilog="Example: fedblocks init --model ./Qwen2.5-0.5B --general general.jsonl --out runs/clinic")
def init(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="the run folder to make")],
    general: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL that measures general ability during the run, at most 8 MiB"),
    ] = None,
    anchor_sequences: Annotated[int, typer.Option(help="anchor texts to sample from the base")] = 512,
    anchor_tokens: Annotated[int, typer.Option(help="longest anchor text, tokens")] = 256,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="encoders: JSONL rows with every label, or one label on each line"),
    ] = None,
    anchor_texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="encoders: texts that the embedding is held to, JSONL or one on each line"),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="run.method: fedbe, or one to compare with it (docs/methods.md)")
    ] = "",
    overrides: SetOption = None,
) -> None:
    """Make a run folder: on any machine with the base model and torch. Copy it to the aggregator."""
    from fedblocks.edge_client.init_run import init_run

    made = init_run(
        model=model,
        out=out,
        general=general,
        overrides=(*(overrides or ()), *([f"run.method={method}"] if method else [])),
        anchor_sequences=anchor_sequences,
        anchor_tokens=anchor_tokens,
        labels=labels,
        anchor_texts=anchor_texts,
    )
    blocks = ", ".join(f"{b.block_id} after layer {b.after_layer}" for b in made.plan.blocks)
    what = f"expanded blocks: {blocks}" if blocks else f"trains {made.plan.trainable_text()}"
    typer.echo(f"run {made.run_id}: base {made.base_name} ({made.base_hash[:16]}…)")
    typer.echo(f"{what}; anchor: {made.num_anchor_tokens} tokens {made.anchor_origin}")
    typer.echo(f"next: fedblocks invite {out} SITE, then fedblocks serve {out}")


@keys_app.command("list", epilog="Example: fedblocks keys list runs/clinic")
def keys_list(run: RunArgument, as_json: JsonFlag = False) -> None:
    """List the client keys of a run."""
    from fedblocks.aggregator.auth import Registry

    entries = Registry(run).list()
    if as_json:
        typer.echo(json.dumps([{"name": e.name, "key": e.key, "standing": e.standing} for e in entries], indent=2))
        return
    for e in entries:
        typer.echo(f"{e.name:24} {e.standing:9} {e.key}")


@keys_app.command(
    "enrol", epilog="Example: fedblocks keys enrol runs/clinic site-a --key='rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7'"
)
def keys_enrol(
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="the site's name")],
    key: Annotated[str, typer.Option(metavar="KEY", help="the public key that `fedblocks join` printed")],
) -> None:
    """Let the holder of KEY take part under NAME. Works while the run is served."""
    from fedblocks.aggregator.auth import Registry

    Registry(run).enrol(key, name, now_unix_s=time.time())
    typer.echo(f"enrolled {name}")


@keys_app.command("revoke", epilog="Example: fedblocks keys revoke runs/clinic site-a")
def keys_revoke(run: RunArgument, name: Annotated[str, typer.Argument(help="name or key")]) -> None:
    """Shut a client out, also on its live connection. Works while the run is served."""
    from fedblocks.aggregator.auth import Registry

    Registry(run).revoke(name, now_unix_s=time.time())
    typer.echo(f"revoked {name}")


@keys_app.command(
    "rotate",
    epilog="Example: fedblocks keys rotate runs/clinic site-a --key='rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7'",
)
def keys_rotate(
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="the site's name")],
    key: Annotated[str, typer.Option(metavar="KEY", help="the site's new public key")],
) -> None:
    """Put KEY in the place of the site's key, which is shut out at once. Works while the run is served."""
    from fedblocks.aggregator.auth import Registry

    Registry(run).rotate(name, key, now_unix_s=time.time())
    typer.echo(f"{name} has a new key; the old one is revoked")


@keys_app.command("release", epilog="Example: fedblocks keys release runs/clinic site-a")
def keys_release(run: RunArgument, name: Annotated[str, typer.Argument(help="the site's name")]) -> None:
    """End a client's quarantine (server.quarantine_after refused updates). Works while the run is served."""
    from fedblocks.aggregator.ledger import release
    from fedblocks.aggregator.run_folder import read_run_folder

    release(read_run_folder(run).ledger_path, name)
    typer.echo(f"{name} may take part again")


@app.command(epilog="Example: fedblocks invite runs/clinic site-a --out site-a.toml")
def invite(
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="the site's name")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="where to write it; default: NAME.toml")] = None,
    overrides: SetOption = None,
) -> None:
    """Write the one file that a site needs. It holds no secret."""
    from fedblocks.aggregator.invitation import write_invitation

    path = out or Path(f"{name}.toml")
    write_invitation(run, name=name, out=path, overrides=tuple(overrides or ()))
    typer.echo(f"wrote {path}; on the site: fedblocks join {path.name} --data train.jsonl --model DIR")


@app.command(epilog="Example: fedblocks serve runs/clinic")
def serve(run: RunArgument, overrides: SetOption = None) -> None:
    """Run the aggregator on a run folder, or resume it. Needs neither torch nor the model."""
    from fedblocks.aggregator.heap import give_back_large_blocks
    from fedblocks.aggregator.server import serve as serve_run

    give_back_large_blocks()
    raise typer.Exit(serve_run(run, overrides or (), on_event=lambda line: typer.echo(line)))


@app.command(epilog="Example: fedblocks stop runs/clinic")
def stop(
    run: RunArgument,
    timeout_s: Annotated[float, typer.Option(min=0, help="give up after so many seconds")] = 60.0,
) -> None:
    """Stop the aggregator that serves a run, as Ctrl-C does, and wait until it has. `serve` goes on from there."""
    from fedblocks.aggregator.stopping import stop as stop_run

    stop_run(run, timeout_s=timeout_s)
    typer.echo(f"stopped; fedblocks serve {run} goes on")


@app.command(epilog="Example: fedblocks status runs/clinic --json")
def status(
    run: RunArgument,
    as_json: JsonFlag = False,
    follow_it: Annotated[
        bool,
        typer.Option("--follow", help="say it again on every change until the run ends or Ctrl-C; JSON: one line each"),
    ] = False,
) -> None:
    """Say where a run stands: rounds, clients, scores, refusals. Reads the ledger only."""
    from fedblocks.aggregator.status import describe, follow, run_status

    if not follow_it:
        content = run_status(run)
        typer.echo(json.dumps(content, indent=2) if as_json else describe(content))
        return
    with contextlib.suppress(KeyboardInterrupt):  # that is how one stops watching
        for i, text in enumerate(follow(run, json.dumps if as_json else describe)):
            typer.echo(text if as_json or i == 0 else f"\n{text}")


@app.command(epilog="Example: fedblocks plan runs/clinic --device jetson-orin-nano-8gb --device rtx-4090")
def plan(
    run: RunArgument,
    device: Annotated[
        list[str] | None, typer.Option(help="plan for these catalog devices instead of the clients seen; repeatable")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="with --device: training examples per device")] = 1000,
    tokens: Annotated[int, typer.Option(min=2, help="with --device: tokens per example")] = 256,
    as_json: JsonFlag = False,
    overrides: SetOption = None,
) -> None:
    """Explain who trains what and why: the last planned round, or a plan for catalog devices."""
    from fedblocks.aggregator.plan_view import last_plan, plan_for_devices

    if device:
        content = plan_for_devices(run, device, num_examples=examples, tokens=tokens, overrides=tuple(overrides or ()))
    else:
        content = last_plan(run)
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    typer.echo(f"round {content['round']}: deadline {content['deadline']['seconds']:.1f} s")
    for choice in content["choices"]:
        typer.echo(choice["sentence"])
    if waiting := content.get("not_in_cohort"):
        typer.echo(f"{len(waiting)} clients are not in this round's cohort: {', '.join(waiting)}.")


@app.command(epilog="Example: fedblocks probe --json profile.json")
def probe(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the profile here")
    ] = None,
    budget_s: Annotated[float, typer.Option(help="seconds to spend, beside the imports")] = 12.0,
    folder: Annotated[Path, typer.Option(help="folder whose disk is measured")] = Path(),
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="SITE.toml", help="also show what traffic with this site's aggregator has measured so far"
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="keep the profile in this client's folder, where `join` takes it from"),
    ] = None,
) -> None:
    """Measure this device in under 20 seconds.

    The line to the aggregator is measured by `fedblocks preflight` and by the traffic of `fedblocks join`.
    """
    from fedblocks.edge_client.decode_rate import nf4_decode_run
    from fedblocks.edge_client.link import read_record
    from fedblocks.profiles.probe import describe, to_json
    from fedblocks.profiles.probe import probe as measure
    from fedblocks.protocol import site_file

    kept = (home or Path("~/.fedblocks")).expanduser()
    link = read_record(kept, site_file.load(site).address) if site is not None else None
    result = measure(budget_s=budget_s, folder=folder, link=link, decoder=nf4_decode_run)
    if home is not None:
        from fedblocks.edge_client.client import write_profile

        kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_profile(kept, result.profile, result.before)
    typer.echo(describe(result))
    if json_file:
        json_file.write_text(to_json(result), encoding="utf-8")


@app.command(epilog="Example: fedblocks simulate fleet.toml --out runs/fleet")
def simulate(
    fleet: Annotated[Path, typer.Argument(metavar="FLEET.toml", help="devices, chances, events: docs/simulate.md")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the run, the result and the picture")] = Path(
        "runs/fleet"
    ),
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the base model; default: the bundled starter and its task")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(metavar="FILE", help="with --model: rows to deal to the clients")
    ] = None,
    general: Annotated[
        Path | None, typer.Option(metavar="FILE", help="with --model: rows that measure general ability")
    ] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="with an encoder: as for init")] = None,
    anchor_texts: Annotated[Path | None, typer.Option(metavar="FILE", help="with an encoder: as for init")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="where to write the result; default: DIR/result.json")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, max=64, help="processes that do the arithmetic; the result is the same with any number"),
    ] = 1,
) -> None:
    """Run a fleet of assumed devices: real aggregator, sessions, sockets and training, on a virtual clock."""
    from fedblocks.fleet_file import load
    from fedblocks.simulation import inputs_of
    from fedblocks.simulation import simulate as run
    from fedblocks.simulation_report import plot, print_result

    wanted = load(fleet)
    inputs = inputs_of(model, train, general, out, labels=labels, anchor_texts=anchor_texts)
    result = run(wanted, inputs, out, workers=workers, say=lambda line: typer.echo(line))
    print_result(result)
    path = json_file or out / "result.json"
    path.write_text(json.dumps(result.to_plain(), indent=1), encoding="utf-8")
    plot(result, out / "plot.png", say=lambda line: typer.echo(line))
    typer.echo(f"result: {path}; run folder: {result.run}")


@app.command(epilog="Example: fedblocks preflight site-a.toml --data train.jsonl --model ./Qwen2.5-0.5B")
def preflight(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="the file from `fedblocks invite`")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="the rows that `join` will train on")],
    model: ModelOption,
    home: Annotated[Path, typer.Option(metavar="DIR", help="where the client keeps its key and state")] = Path(
        "~/.fedblocks"
    ),
    socks_proxy: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="SOCKS5 proxy for the connection")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask everything that `join` needs: data, model, 4-bit kernel, memory, disk, connection, key; with what to do.

    It also times the line. Trains nothing; what leaves this machine is what `join` says first, and no text of the data.
    The exit code is that of the first no.
    """
    from fedblocks.edge_client.client import JoinOptions
    from fedblocks.edge_client.preflight import preflight as ask
    from fedblocks.protocol import site_file

    options = JoinOptions(
        site=site_file.load(site), data=data, model=model, home=home.expanduser(), socks_proxy=socks_proxy
    )
    found = ask(options, say=lambda line: typer.echo(line, err=True))
    typer.echo(json.dumps(found.to_plain(), indent=2) if as_json else found.text())
    raise typer.Exit(found.exit_code)


@app.command(epilog="Example: fedblocks kernels --calibrate")
def kernels(
    home: Annotated[Path, typer.Option(metavar="DIR", help="where the client keeps its calibration")] = Path(
        "~/.fedblocks"
    ),
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure again, under 20 s")] = False,
    site: Annotated[
        Path | None, typer.Option(metavar="SITE.toml", help="also show what its section [kernels] demands")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say who computes each operation on this device, a compiled pack, Triton or torch, and why."""
    from fedblocks.edge_client.kernel_choice import describe_kernels
    from fedblocks.protocol import site_file

    settings = site_file.load(site).kernels if site is not None else site_file.KernelsSettings()
    report = describe_kernels(home.expanduser(), settings, again=calibrate, say=lambda line: typer.echo(line, err=True))
    typer.echo(json.dumps(report.to_plain(), indent=2) if as_json else report.text())


@app.command(epilog="Example: fedblocks join site-a.toml --data train.jsonl --model ./Qwen2.5-0.5B")
def join(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="the file from `fedblocks invite`")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSONL: text, or prompt and completion, or messages")],
    model: ModelOption,
    home: Annotated[Path, typer.Option(metavar="DIR", help="where the client keeps its key and state")] = Path(
        "~/.fedblocks"
    ),
    evaluate: Annotated[bool, typer.Option(help="also measure general ability for the run")] = False,
    dry_run: Annotated[bool, typer.Option(help="print what would leave this machine, then stop")] = False,
    wait: Annotated[bool, typer.Option(help="wait for enrolment even if the key is not new")] = False,
    cache_gb: Annotated[
        float | None, typer.Option(help="cache.max_gb: most that the cache may take, GB; 0: a share of what is free")
    ] = None,
    cache_location: Annotated[
        str | None, typer.Option(metavar="WHERE", help="cache.location: auto, disk or ram")
    ] = None,
    keep_cache: Annotated[
        bool | None,
        typer.Option("--keep-cache/--no-keep-cache", help="cache.keep: keep hidden states for the next session"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="TYPE", help="runtime.dtype: auto, float32 or bfloat16")] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(help="runtime.memory_gb: most memory above the imports, GB; 0: what the device has"),
    ] = None,
    hours: Annotated[
        str | None, typer.Option(metavar="FROM-TO", help="join.hours: local hours in which to take tasks, e.g. 22-6")
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="behave like this catalog device: pauses, and its memory budget"),
    ] = None,
    emulate_scale: Annotated[float, typer.Option(help="factor on the emulated device's speed and memory")] = 1.0,
    socks_proxy: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="SOCKS5 proxy for the connection")
    ] = None,
    flower: Annotated[
        Path | None,
        typer.Option(metavar="SOCKET", help="take part through a Flower SuperNode, which asks here (docs/flower.md)"),
    ] = None,
) -> None:
    """Take part in a run as a site. The data never leave this machine.

    Options that name a section.key may stand in SITE.toml as well; given here they go over it.
    """
    from fedblocks.edge_client.client import JoinOptions
    from fedblocks.edge_client.client import join as join_run
    from fedblocks.protocol import site_file

    own = {
        "cache.max_gb": cache_gb,
        "cache.location": cache_location,
        "cache.keep": keep_cache,
        "runtime.dtype": dtype,
        "runtime.memory_gb": memory_gb,
        "join.hours": hours,
    }
    options = JoinOptions(
        site=site_file.load(site, {key: value for key, value in own.items() if value is not None}),
        data=data,
        model=model,
        home=home.expanduser(),
        evaluate_general=evaluate,
        dry_run=dry_run,
        wait_for_enrolment=wait,
        emulate=emulate,
        emulate_scale=emulate_scale,
        socks_proxy=socks_proxy,
        flower=flower,
    )
    raise typer.Exit(join_run(options, say=lambda line: typer.echo(line)))


@app.command(epilog="Example: fedblocks export runs/clinic --model ./Qwen2.5-0.5B --to hf --out ./clinic-model")
def export(
    run: RunArgument,
    model: ModelOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to write")],
    to: Annotated[
        str, typer.Option(help="hf: a Hugging Face folder that loads without fedblocks; onnx: a graph for ONNX Runtime")
    ] = "hf",
    strength: Annotated[
        float | None,
        typer.Option(
            help="0 gives the base model back, 1 all that was learnt; default: the best within the forgetting budget"
        ),
    ] = None,
    int4: Annotated[
        bool, typer.Option("--int4", help="with --to onnx: weights in 4 bits; what that costs is measured and said")
    ] = False,
    client: Annotated[
        str,
        typer.Option(metavar="NAME", help="this site's own model, of a run with clusters; default: the one for all"),
    ] = "",
) -> None:
    """Write the run's published model as an ordinary checkpoint, or as an ONNX graph."""
    if to not in ("hf", "onnx"):
        raise typer.BadParameter(f"{to!r} is not supported, expected hf or onnx", param_hint="--to")
    if int4 and to != "onnx":
        raise typer.BadParameter("weights in 4 bits need --to onnx", param_hint="--int4")
    if client and to != "hf":
        raise typer.BadParameter("a site's own model is written with --to hf", param_hint="--client")
    if to == "onnx":
        from fedblocks.edge_client.onnx_export import MODEL_FILE, export_run_onnx

        graph = export_run_onnx(run, model=model, out=out, strength=strength, int4=int4)
        summary = graph.checkpoint
        typer.echo(
            f"wrote {graph.path / MODEL_FILE} at strength {summary.strength:g}; "
            f"in fp32 ONNX Runtime's outputs differ from torch's by at most {graph.max_abs_logit_difference:.2g}"
        )
        for line in graph.int4.lines if graph.int4 else ():
            typer.echo(f"  4-bit weights, {line}")
    else:
        from fedblocks.edge_client.export import export_run

        summary = export_run(run, model=model, out=out, strength=strength, client=client)
        typer.echo(
            f"wrote {summary.path} at strength {summary.strength:g}; strength 0 equals the base bit for bit: verified"
        )
    for what, value in summary.measured.items():
        typer.echo(f"  {what}: {value}")
    if summary.left_out:
        blocks = ", ".join(map(str, summary.left_out))
        typer.echo(f"nobody trained block {blocks}: left out, since the model computes the same without it")


@app.command(
    epilog="Example: fedblocks evaluate ./clinic-model --base ./Qwen2.5-0.5B --downstream test.jsonl "
    "--general general.jsonl --suite tasks/"
)
def evaluate(
    target: Annotated[Path, typer.Argument(help="a model folder, or a run folder (its 4-bit stack)")],
    base: Annotated[Path, typer.Option(metavar="DIR", help="the base model")],
    downstream: Annotated[Path | None, typer.Option(metavar="FILE", help="JSONL of the task that was learnt")] = None,
    general: Annotated[Path | None, typer.Option(metavar="FILE", help="JSONL of general ability")] = None,
    suite: Annotated[
        Path | None, typer.Option(metavar="DIR", help="general tasks: every *.jsonl of the folder is one")
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(metavar="TARGET", help="with --suite: the same experiment with another seed; repeatable"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="with --suite: the first rows of each task only")] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="with --suite: plain texts as one text, in full windows")
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="with --suite: longest input in tokens; default: the model's, at most 2048"),
    ] = None,
    kl_sequences: Annotated[
        int, typer.Option(min=1, help="with --suite: texts of 256 tokens that the base writes to measure the KL on")
    ] = 256,
    items_file: Annotated[
        Path | None, typer.Option("--items", metavar="FILE", help="with --suite: write a JSON line for each item here")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="for a run folder: strength of the expanded blocks; default: the one that an export takes"),
    ] = None,
    overrides: SetOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write the result here")] = None,
) -> None:
    """Measure what was learnt and what was kept: downstream score, retention over a suite, KL to the base."""
    from fedblocks.api import evaluate as measure

    if suite is None and (also or limit or packed or window or items_file):
        raise typer.BadParameter(
            "--also, --limit, --packed, --window and --items need a folder of tasks", param_hint="--suite"
        )
    result = measure(
        [target, *(also or ())],
        base=base,
        suite=suite,
        downstream=downstream,
        general=general,
        strength=strength,
        overrides=tuple(overrides or ()),
        limit=limit,
        packed=packed,
        window=window,
        kl_sequences=kl_sequences,
    )
    if "target" in result:
        from fedblocks.edge_client.evaluation import describe

        typer.echo(describe(result))
    if suite is not None:
        from fedblocks.edge_client.suite import describe_suite

        typer.echo(describe_suite(result["suite"]))
        items = result["suite"].pop("items")
        if items_file:
            items_file.write_text("".join(json.dumps(row) + "\n" for row in items), encoding="utf-8")
    if json_file:
        json_file.write_text(json.dumps(result, indent=2), encoding="utf-8")


@app.command(epilog="Example: fedblocks demo --json runs/demo/result.json")
def demo(
    json_file: Annotated[
        Path, typer.Option("--json", metavar="FILE", help="where the result goes; its folder holds the run")
    ] = Path("runs/demo/result.json"),
    quick: Annotated[bool, typer.Option(help="two clients and three rounds, under a minute")] = False,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="another base model; default: the bundled starter")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL to federate, split over the clients")
    ] = None,
    general: Annotated[Path | None, typer.Option(metavar="FILE", help="JSONL that measures general ability")] = None,
    overrides: SetOption = None,
) -> None:
    """Federate a model on this machine: one aggregator and four unequal client processes over encrypted sockets."""
    from fedblocks.demo import DemoOptions, run_demo

    options = DemoOptions(
        json_file=json_file, quick=quick, model=model, train=train, general=general, overrides=tuple(overrides or ())
    )
    raise typer.Exit(run_demo(options))


def main() -> None:
    """Run the command line; a user's mistake is one line and an exit code, never a traceback."""
    if sys.platform == "win32":
        sys.stderr.write("fedblocks runs on Linux (x86-64, aarch64) and in WSL2, not on native Windows\n")
        sys.exit(EXIT_USAGE)
    try:
        code: Any = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted; the same command resumes\n")
        code = EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the program's last resort: told with its exit code, or shown whole
        code = getattr(error, "exit_code", None)
        if code is None or "--debug" in sys.argv:
            traceback.print_exc()
        if hasattr(error, "show"):  # a usage error of the command line's own library
            error.show()
        elif code is not None:
            sys.stderr.write(f"fedblocks: {error}\n")
        code = 1 if code is None else code
    sys.exit(code or 0)
