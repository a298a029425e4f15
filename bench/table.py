"""Writes bench/results/README.md and its pictures from the results beside it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import comfyui_rows
import loaders
import peers
import plot
import pressure

RESULTS = Path(__file__).parent / "results"
GIB, MIB = 1 << 30, 1 << 20

HEAD = """# Results

Written by `python bench/table.py` from the files beside it; a folder is a day and a machine. Ratios hold within one run:
these machines are shared.

**The stack** (`bench/stack.py`): bf16 transformer blocks of random weights in one safetensors file in the page cache, run as
plain torch with everything resident, then attached while a ballast leaves only the memory given. The limit of a step is
max(compute, bytes moved / link): compute is the plain step's time, the bytes are counted by the engine, the link is the
pinned host to device rate of the same run. "Same" compares every output with the plain one, bit for bit. Later steps are
the median of the last half. A source of `registered` lets the engine register the page cache, `ring` does not. The engine
that ran one number of tokens runs the next, and keeps what it has registered: only the first row of each table begins with
nothing registered.

**In little memory** (`bench/stack.py` in a memory cgroup) runs the same where the page cache cannot hold the weights. What
should be read from disk a step: at most 1.10 x (streamed - 0.8 x the cgroup's memory). `bench/little_ram.py` runs a file many
times as large as the memory, without a GPU too.

**What fits** (`bench/fits.py`) is timed in turn with plain torch. **Warm starts** (`bench/warm.py`) use three models in turn.
**Growth** (`bench/scale.py`) has more and larger weights. **The ring's shape** (`bench/ring.py`) is what streamed pages go
through where they are not registered; `bench/copies.py` is about what lies between its copies.

**Adapters** (`bench/lora.py`): steps of the stack without adapters and with one of rank 16 on each of its linear layers, in
turn; "over" is the median of the one over the median of the other. What a change refills is counted by the engine, and holds
the pages of the weights that it touches, which may begin and end in other weights. **Conversion** (`bench/convert.py`): steps of
streamed blocks that are stored as float8 and used as bf16, all through the ring; the limit is what is stored over the link.

**ComfyUI** (`bench/comfyui.py`) samples random weights of the real shapes under its own offloading, comfy-aimdo and Forebay.
`bench/starve.cu` has one stream copy without a pause, and times what others copy meanwhile.
`bench/loading.py` times how long the driver takes to load kernels beside what readers do, and `bench/launching.py` what a layer of scaled
float8 takes of the thread that launches kernels.

**Pressure** (`bench/pressure.py`) runs stacks of up to four times a card in it while activations and another process take its
memory. **Switches** (`bench/switch.py`) are from one model that does not fit to another, and
`bench/experts.py` has two that fit together into no memory at all.

**The peers** (`bench/peers.py`) run the stack's blocks from the same file, each in a process of its own, and
`bench/loaders.py` loads the whole file to the GPU, where everything fits.
"""

STACK_TARGETS = (1.06, 1.15)
"""Later steps over their limit, at most: of the registered page cache, and of the ring."""
LORA_TARGET = 1.10
"""A streamed step with adapters over one without, at most; a resident one is the same."""
READ_TARGET = 1.10
"""Bytes read from disk, over those that the page cache cannot hold."""

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str | None]]

SOURCE: list[Column] = [("source", lambda row: row.get("source"))]
STEPS: list[Column] = [
    ("tokens", lambda row: str(row["tokens"])),
    ("same", lambda row: "yes" if row["same"] else "NO"),
    ("compute", lambda row: ms(row["compute_s"])),
    ("moved a step", lambda row: gb(row["moved_bytes"])),
    ("first step", lambda row: ms(row["first_s"])),
    ("x limit", lambda row: f"{row['first_ratio']:.2f}"),
    ("later steps", lambda row: ms(row["later_s"])),
    ("x limit", lambda row: f"{row['ratio']:.2f}"),
]
COSTS: list[Column] = [
    ("longest wait", lambda row: f"{longest_wait(row) * 1e3:.1f} ms" if "last_step" in row else None),
    ("engine's CPU a step", lambda row: f"{row['engine_cpu_s']:.2f} s" if "engine_cpu_s" in row else None),
    ("anonymous memory", lambda row: f"+{row['anonymous_mib']:.0f} MiB"),
]


def main() -> None:
    parts = [HEAD.strip()]
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    # The latest day first.
    for folder in sorted(folders, key=lambda path: path.name[:10], reverse=True):
        parts.append(f"## {folder.name}")
        notes = folder / "notes.md"
        parts += [notes.read_text().strip()] if notes.exists() else []
        parts += on_cards_of_all_sizes(folder)
        for pattern, section in SECTIONS:
            parts += [section(path) for path in sorted(folder.glob(pattern))]
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


def stack(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [{"free_gib": result.get("free_gib"), **row} for row in result["rows"]]
    sizes = list(dict.fromkeys(row["free_gib"] for row in rows))
    free = " and ".join(", ".join(f"{size:g}" for size in sizes).rsplit(", ", 1))
    parts = [f"### The stack: {gb(result['weights_bytes'])} in {free} GiB", described(path, result)]
    if any("last_step" in row for row in rows):
        parts[-1] += " The longest wait is a caller's, in the last step."
    for size in sizes:
        of_size = [row for row in rows if row["free_gib"] == size]
        parts += [f"{size:g} GiB free:", columns(SOURCE + STEPS + COSTS, of_size)]
    if any("source" in row for row in rows):
        parts.append(picture(path, "later steps over their limit", stack_picture(result, rows, sizes)))
    return "\n\n".join(parts)


def stack_picture(result: Row, rows: Sequence[Row], sizes: Sequence[float]) -> str:
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    sources = list(dict.fromkeys(row["source"] for row in rows))
    found = {(row["free_gib"], row["source"], row["tokens"]): row["ratio"] for row in rows}
    most = max([*found.values(), STACK_TARGETS[1]])
    scale = plot.Scale([0.9 + 0.05 * i for i in range(2 + max(0, -int((0.9 - most) // 0.05)))])
    panels = [
        plot.Panel(
            f"{size:g} GiB free",
            [f"{n}" for n in tokens],
            {source: [found.get((size, source, n)) for n in tokens] for source in sources},
            marks=STACK_TARGETS,
            scale=scale,
        )
        for size in sizes
    ]
    subtitle = (
        f"{result['gpu']}, {gb(result['weights_bytes'])} of bf16 blocks, link {result['link_gb_s']:.0f} GB/s; over tokens a "
        f"step; dashed: the targets, {STACK_TARGETS[0]} registered and {STACK_TARGETS[1]} through the ring"
    )
    return plot.lines("Later steps, over the limit", subtitle, panels, len(panels))


def little_memory(path: Path) -> str:
    result = json.loads(path.read_text())
    ram = int(re.sub(r"\D", "", path.stem)) * GIB
    extra: list[Column] = [
        ("from disk, each later step", lambda row: ", ".join(f"{n / 1e9:.1f}" for n in row["disk_bytes"]) + " GB"),
        ("beyond 0.8 of the memory", lambda row: gb(beyond(row, ram))),
        (f"read, of these (at most {READ_TARGET:.2f})", lambda row: f"{settled_reads(row) / beyond(row, ram):.2f}"),
        ("reading, last step", lambda row: f"{row['disk_bytes'][-1] / row['steps_s'][-1] / 1e9:.1f} GB/s"),
    ]  # fmt: skip
    title = f"### In {ram / GIB:g} GiB of RAM: {gb(result['weights_bytes'])}, {result['rows'][0]['free_gib']:g} GiB free"
    return "\n\n".join([title, described(path, result), columns(STEPS + extra + COSTS, result["rows"])])


def beyond(row: Row, ram: int) -> float:
    """What a step streams and a page cache of four fifths of the memory cannot hold."""
    return row["moved_bytes"] - 0.8 * ram


def settled_reads(row: Row) -> float:
    return statistics.median(row["disk_bytes"][len(row["disk_bytes"]) // 2 :])


def many_times_ram(path: Path) -> str:
    result = json.loads(path.read_text())
    title = f"### {gb(result['weights_bytes'])} of weights in {result['limit_bytes'] / GIB:.0f} GiB of memory"
    of_device = f"{result['budget_gib']:g} GiB of them the device's" if result["gpu"] == "none" else ""
    same = "the same bits" if result["same"] else "ANOTHER RESULT"
    told = f"{described(path, result)} {of_device + '; ' if of_device else ''}{same}."
    rows = [
        [
            row["name"],
            f"{row['seconds']:.1f} s",
            gb(row["read_bytes"]),
            f"{row['anonymous_bytes'] / MIB:.0f} MiB",
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([title, told, table(["", "took", "read from disk", "anonymous memory"], rows)])


def fits(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [
        [
            model["name"],
            "lent as a whole" if model["lent"] else "on stand-ins",
            *(f"{model['median_s'][kind] * 1e3:.2f} ms" for kind in ("plain", "attached")),
            f"{model['ratio']:.3f}",
        ]
        for model in result["models"]
    ]
    of_call = result["interception"]
    kinds = [f"{of_call[f'{kind}_us']:.2f} us" for kind in ("plain", "attached")]
    rows.append(["one `F.linear`, 64 x 64", "on stand-ins", *kinds, f"+{of_call['added_us']:.2f} us"])
    head = ["", "runs", "plain torch", "attached", "attached over plain"]
    return "\n\n".join(["### What fits, beside plain torch", described(path, result), table(head, rows)])


def warm(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [
        [
            row["when"], row["part"], gb(row["bytes"]), f"{len(row['steps_s'])}", gb(row["moved_bytes"]),
            ms(row["steps_s"][0]), ms(row["steps_s"][-1]) if len(row["steps_s"]) > 1 else "", "yes" if row["same"] else "NO",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["", "model", "weights", "steps", "moved by all", "first step", "last step", "same"]
    title = f"### Warm starts, {result['free_gib']:g} GiB free"
    return "\n\n".join([title, described(path, result), table(head, rows)])


def growth(path: Path) -> str:
    result = json.loads(path.read_text())
    sizes = [{"from": "", **row} for row in result["bytes"]]
    beside = path.with_name("stack.json")
    if beside.exists():
        of_stack = json.loads(beside.read_text())
        sizes += [
            {"from": "stack.json", "weights_bytes": of_stack["weights_bytes"], **row}
            for row in of_stack["rows"]
            if (row["free_gib"], row.get("source"), row["tokens"]) == (8.0, "registered", 512)
        ]
    sizes.sort(key=lambda row: row["weights_bytes"])
    extra: list[Column] = [
        ("weights", lambda row: gb(row["weights_bytes"])),
        ("free", lambda row: f"{row['free_gib']:.1f} GiB"),
    ]
    since: list[Column] = [
        ("registered by the end", lambda row: gb(row["registered_bytes"])),
        ("from", lambda row: row["from"] or None),
    ]
    parts = [
        "### Growth",
        described(path, result),
        "By bytes:",
        columns(extra + STEPS + since + COSTS, sizes),
    ]
    counts = [
        [
            f"{row['tensors']:,}",
            *(f(row["passes"][at]) for at in (0, -1) for f in (lambda p: ms(p["seconds"]), times_limit)),
            f"{row['passes'][-1]['waits']:,}",
        ]
        for row in result["tensors"]
    ]
    head = ["tensors", "first pass", "x limit", "fifth pass", "x limit", "waits in it"]
    parts += [
        "By number: `forebay bench` over files of the same bytes, in a quarter of their memory, without computing.",
        table(head, counts),
        picture(path, "growth", growth_picture(path, sizes, result["tensors"])),
    ]
    return "\n\n".join(parts)


def times_limit(one_pass: Row) -> str:
    return f"{one_pass['times_limit']:.2f}"


def growth_picture(path: Path, sizes: Sequence[Row], counts: Sequence[Row]) -> str:
    passes = [row["passes"] for row in counts]
    by_bytes = plot.Panel(
        "GB of weights, 512 tokens a step",
        [f"{row['weights_bytes'] / 1e9:.1f}" for row in sizes],
        {"first step": [row["first_ratio"] for row in sizes], "later steps": [row["ratio"] for row in sizes]},
        marks=STACK_TARGETS,
        scale=plot.Scale([0.9, 1.0, 1.1, 1.2, 1.3]),
    )
    by_number = plot.Panel(
        "tensors in the same bytes",
        [f"{row['tensors']:,}" for row in counts],
        {
            "first step": [of_row[0]["times_limit"] for of_row in passes],
            "later steps": [of_row[-1]["times_limit"] for of_row in passes],
        },
        scale=plot.Scale([0.5, 1.0, 1.5, 2.0, 2.5, 3.0]),
    )
    subtitle = f"{machine(path)['gpu']}, the page cache registered; right: without computing; dashed: the targets, {STACK_TARGETS[0]} and {STACK_TARGETS[1]}"
    return plot.lines("Over the limit, by size", subtitle, [by_bytes, by_number], 2)


def lora(path: Path) -> str:
    result = json.loads(path.read_text())
    title = f"### Adapters of rank {result['rank']}: {gb(result['weights_bytes'])}, {gb(result['factors_bytes'])} of factors"
    wanted: list[Column] = [
        ("weights", lambda row: row["kind"]),
        ("budget", lambda row: gb(row["budget"])),
        ("tokens", lambda row: str(row["tokens"])),
        ("same", lambda row: "yes" if row["same"] else "NO"),
        ("moved a step", lambda row: gb(row["moved_bytes"])),
        ("without", lambda row: ms(row["median_s"]["without"])),
        ("with adapters", lambda row: ms(row["median_s"]["with"])),
        (f"over (at most {LORA_TARGET:.2f} streamed)", lambda row: f"{row['ratio']:.3f}"),
    ]
    changed = [
        [
            row["what"],
            gb(row["touched_bytes"]),
            gb(row["refilled_bytes"]),
            ms(row["set_s"]),
            ms(row["first_s"]),
        ]
        for row in result["changes"]
    ]
    head = ["change, everything resident", "weights touched", "refilled", "`set_loras`", "first step after"]
    return "\n\n".join(
        [title, described(path, result), columns(wanted, result["rows"]), table(head, changed)]
    )


def converted(path: Path) -> str:
    result = json.loads(path.read_text())
    wanted: list[Column] = [
        ("stored as", lambda row: row["kind"]),
        ("stored", lambda row: gb(row["stored_bytes"])),
        ("used", lambda row: gb(row["used_bytes"])),
        ("same", lambda row: "yes" if row["same"] else "NO"),
        ("moved a step", lambda row: gb(row["moved_bytes"])),
        ("step", lambda row: ms(row["step_s"])),
        ("x limit", lambda row: f"{row['ratio']:.2f}" if row["ratio"] else None),
    ]
    title = f"### Conversion while filling: {result['rows'][0]['tokens']} tokens"
    return "\n\n".join([title, described(path, result), columns(wanted, result["rows"])])


def ring(path: Path) -> str:
    result = json.loads(path.read_text())
    shapes: dict[tuple[int, int, int], list[Row]] = {}
    for row in result["rows"]:
        shape = row["ring"]
        shapes.setdefault((shape["readers"], shape["slots"], shape["chunk"]), []).append(row)
    rounds = range(max(len(rows) for rows in shapes.values()))
    by_later = sorted(shapes.items(), key=lambda item: statistics.mean(row["ratio"] for row in item[1]))
    rows = [
        [
            f"{readers} x {slots} x {chunk / (1 << 20):.3g} MiB",
            f"{readers * slots * chunk / (1 << 20):.0f} MiB",
            *(f"{row['first_ratio']:.2f}" for row in of_shape),
            *(f"{row['ratio']:.2f}" for row in of_shape),
            f"{statistics.mean(row['engine_cpu_s'] for row in of_shape):.2f} s",
        ]
        for (readers, slots, chunk), of_shape in by_later
    ]
    heads = [f"{step} x limit, round {n + 1}" for step in ("first", "later") for n in rounds]
    head = ["readers x slots x chunk", "pinned", *heads, "engine's CPU a step"]
    one = result["rows"][0]
    title = f"### The ring's shape: {one['tokens']} tokens, {one['free_gib']:g} GiB free"
    return "\n\n".join([title, described(path, result), table(head, rows)])


def side_by_side(
    title: str, tables: Callable[[Row], str], draw: Callable[[Row], str]
) -> Callable[[Path], str]:
    def section(path: Path) -> str:
        result = json.loads(path.read_text())
        return "\n\n".join([f"### {title}", tables(result), picture(path, title, draw(result))])

    return section


def comfyui_cells(path: Path) -> str:
    result = json.loads(path.read_text())
    return "\n\n".join(["### ComfyUI", described(path, result), comfyui_rows.markdown(result)])


def on_cards_of_all_sizes(folder: Path) -> list[str]:
    rows = [
        row for path in sorted(folder.glob("comfyui*.json")) for row in json.loads(path.read_text())["rows"]
    ]
    if not {8, 12, 24, 80} <= {row.get("card_gib") for row in rows}:
        return []
    return ["### ComfyUI, on cards of all sizes: whose result is the same", table(*comfyui_rows.matrix(rows))]


def under_pressure(path: Path) -> str:
    return f"### Under pressure\n\n{pressure.markdown(json.loads(path.read_text()))}"


def switch(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [
        [
            "the GPU idles at a switch",
            f"{result['median_idle_ms']:.2f} ms",
            f"{result['longest_idle_ms']:.2f} ms",
        ]
    ]
    title = f"### Two models in turn, {result['free_gib']:g} GiB free"
    return "\n\n".join([title, described(path, result), table(["", "median", "longest"], rows)])


def experts(path: Path) -> str:
    result = json.loads(path.read_text())
    of: list[Column] = [
        ("round", lambda row: f"{row['round']}"),
        ("expert", lambda row: row["expert"]),
        ("same", lambda row: "yes" if row["same"] else "NO"),
        ("first step", lambda row: f"{row['steps_s'][0]:.2f} s"),
        ("later steps", lambda row: f"{statistics.median(row['steps_s'][1:] or row['steps_s']):.2f} s"),
        ("moved", lambda row: gb(sum(row["moved_bytes"]))),
        ("from disk", lambda row: gb(sum(row["disk_bytes"]))),
        ("x the limits", lambda row: f"{sum(row['steps_s']) / sum(row['limits_s']):.2f}"),
    ]
    ram = f"{result['limit_bytes'] / GIB:g} GiB of RAM" if result["limit_bytes"] else "all RAM"
    title = f"### Two experts of {gb(result['weights_bytes'])} each, {result['free_gib']:g} GiB free, {ram}"
    told = (
        f"All {result['total_s']:.1f} s, {result['ratio']:.2f} times the limits' {result['limit_s']:.1f} s."
    )
    return "\n\n".join([title, f"{described(path, result)} {told}", columns(of, result["rows"])])


def copies(path: Path) -> str:
    result = json.loads(path.read_text())
    sizes = list(dict.fromkeys(row["nbytes"] for row in result["rows"]))
    found = {(row["way"], row["nbytes"]): row for row in result["rows"]}
    head = ["GB/s, and of the link", *(f"{nbytes / MIB:g} MiB" for nbytes in sizes)]
    rows = []
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        of_way = [found[way, nbytes] for nbytes in sizes]
        rows.append([way, *(f"{row['bytes_s'] / 1e9:.1f} ({row['of_link']:.2f})" for row in of_way)])
    title = f"### Copies of different sizes from {result['slots']} pinned slots"
    return "\n\n".join([title, described(path, result), table(head, rows)])


def checks(path: Path) -> str:
    return (
        f"### The whole suite on the GPU\n\n`bench/gpu_check.sh`\n\n```text\n{path.read_text().strip()}\n```"
    )


def summary(path: Path) -> str:
    return f"### What the run printed\n\n[{path.name}]({path.relative_to(RESULTS)})"


SECTIONS: list[tuple[str, Callable[[Path], str]]] = [
    ("stack.json", stack),
    ("ram*.json", little_memory),
    ("little_ram.json", many_times_ram),
    ("fits.json", fits),
    ("warm.json", warm),
    ("scale.json", growth),
    ("lora.json", lora),
    ("convert.json", converted),
    ("ring.json", ring),
    ("copies.json", copies),
    ("peers*.json", side_by_side("Forebay and its peers", peers.markdown, peers.picture)),
    ("comfyui*.json", comfyui_cells),
    ("loaders.json", side_by_side("Loading a file to the GPU", loaders.markdown, loaders.picture)),
    ("pressure*.json", under_pressure),
    ("switch.json", switch),
    ("experts*.json", experts),
    ("tests.txt", checks),
    ("summary.txt", summary),
]


def described(path: Path, result: Row) -> str:
    """Hardware, date and command of a result; what a file does not say is the same in all of its folder."""
    of_folder = machine(path)
    told = f"{of_folder['gpu']}, {of_folder['cores']} cores, torch {of_folder['torch']}"
    link = result.get("link_gb_s")
    told += f", link {link:.1f} GB/s" if link else ""
    command = re.sub(r" --out [^ ]+", "", result.get("command", ""))
    ran = f"`{command}`" if command else f"`bench/{path.stem}.py`; the file has no command"
    return f"{told}, {of_folder['date']}. {ran}."


def machine(path: Path) -> Row:
    found = (json.loads(beside.read_text()) for beside in [path, *sorted(path.parent.glob("*.json"))])
    return next(result for result in found if "gpu" in result)


def picture(path: Path, title: str, svg: str) -> str:
    drawn = path.with_suffix(".svg")
    drawn.write_text(svg)
    return f"![{title}]({drawn.relative_to(RESULTS)})"


def columns(wanted: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table of those columns that have something in them."""
    filled = [
        (title, cells)
        for title, cell in wanted
        if any(cells := [cell(row) for row in rows])  # None in all: the file is older than the column
    ]
    lines = zip(*(cells for _, cells in filled), strict=True)
    return table([title for title, _ in filled], ([cell or "" for cell in line] for line in lines))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def longest_wait(row: Row) -> float:
    return row["last_step"].get("wait", {}).get("longest_s", 0.0)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
