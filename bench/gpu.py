"""One part of the GPU benchmark of scripts/gpu, or its table, on synthetic data; see docs/gpu.md.

    python bench/gpu.py machine|B|S|L|compile_B|...|road|science|table --out FOLDER [--quick]

A part writes FOLDER/PART.json. `--quick` runs the same code with tiny sizes, also on a CPU.
"""

import argparse
import json
from pathlib import Path

B16, B16_COMPILED = "B/16, eager teacher", "B/16, compiled teacher"
L14, MANY = "L/14 at 196 px, eager teacher", "many processes"
# (part, row, column, what it is, bar, forecast of an H200 by arithmetic before any GPU was seen)
TABLE = (
    ("machine", "ceilings", "matmul_tflops", "bf16 matrix product, TFLOP/s", "", "770-800"),
    ("machine", "ceilings", "copy_tb_per_s", "device copy, TB/s", "", "4.3"),
    ("machine", "ceilings", "h2d_gb_per_s", "host to device, pinned, GB/s", "", "50"),
    ("B", "eager", "images_per_s", "ViT-B/16, eager, images/s", "", "2,300-2,600"),
    ("B", "compiled", "images_per_s", "ViT-B/16, compiled, images/s", "", "2,800-3,100"),
    ("B", "compiled", "utilization", "ViT-B/16, share of the matrix rate", ">= 0.45", "0.49-0.53"),
    ("L", "compiled", "utilization", "ViT-L/16, share of the matrix rate", ">= 0.55", "0.55-0.59"),
    ("S", "compiled", "images_per_s", "ViT-S/16, compiled, images/s", "", "6,500-7,300"),
    ("S", "compiled", "utilization", "ViT-S/16, share of the matrix rate", "", "0.26-0.30"),
    ("B", "stream, 8 workers", "ratio", "ViT-B/16, stream-fed against resident", ">= 0.97", ""),
    ("S", "stream, 8 workers", "ratio", "ViT-S/16, the same, 8 workers", ">= 0.97", ""),
    ("S", "stream, 12 workers", "ratio", "ViT-S/16, the same, 12 workers", ">= 0.97", ""),
    ("B", "checkpoint", "share", "checkpoints, share of a run of ViT-B", "<= 0.02", "0.023"),
    ("L", "checkpoint", "share", "checkpoints, share of a run of ViT-L", "<= 0.02", "0.04-0.06"),
    ("online", B16, "gain", "cached against online, B with B/16", "", "1.40-1.45"),
    ("online", B16, "ratio", "the same, of the arithmetic", ">= 0.95", ""),
    ("online", B16_COMPILED, "gain", "cached against online, compiled B/16", "", "1.28"),
    ("online", L14, "gain", "cached against online, B with L/14", "", "2.0"),
    ("online", L14, "ratio", "the same, of the arithmetic", ">= 0.95", ""),
    ("extract", "forward", "views_per_s_256", "CLIP B/16 forward, views/s", "", "6,000-8,000"),
    ("extract", "1 process", "views_per_s", "extraction, one process, views/s", "", "600-900"),
    ("extract", MANY, "views_per_s", "extraction, many processes, views/s", "", "4,000-4,900"),
    ("road", "first command", "exit", "mcm-train pretrain, SIGTERM: exit code", "75", "75"),
    ("road", "second command", "exit", "the same command again: exit code", "0", "0"),
    ("road", "second command", "images_per_s", "images/s of that run's log", "", ""),
)  # fmt: skip


def print_table(out: Path) -> None:
    """Print measurement, bar and forecast of the finished parts; merge their JSON into gpu.json."""
    names = {part for part, *_ in TABLE}
    parts = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in names
        if (out / f"{name}.json").exists()
    }
    (out / "gpu.json").write_text(json.dumps(parts, indent=1, sort_keys=True) + "\n")
    found = {name: part["table"] for name, part in parts.items()}
    print(f"{found.get('machine', {}).get('where', {}).get('device', 'unknown device')}")
    print(f"{'':44}{'measured':>12}{'bar':>10}  forecast")
    for part, row, column, text, bar, forecast in TABLE:
        value = found.get(part, {}).get(row, {}).get(column, "-")
        print(f"{text:44}{value:>12}{bar:>10}  {forecast}")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True, help="folder of the parts' JSON files")
    parser.add_argument("--data", type=Path, help="of the part science: its dataset and its cache")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on the CPU too")
    options = parser.parse_args()
    if options.part == "table":
        print_table(options.out)
    else:
        # Imported here: workers import this file again; torch, timm and accelerate take 6 s.
        import gpu_parts

        gpu_parts.run(options.part, options.out, options.quick, options.data)


if __name__ == "__main__":
    main()
