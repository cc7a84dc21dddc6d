"""Take a model elsewhere: GGUF for llama.cpp and ollama, a plain Hugging Face folder, or a repository of the hub.

    python -m jobs.export models:/demo@champion --to gguf --type q8_0 --output demo-gguf
    python -m jobs.export champion --to folder --output demo-hf [--preset demo]
    python -m jobs.export champion --to hub --repository me/demo [--private] [--yes]

What is exported is a version (models:/name@alias, or a number or alias of the preset's model), a training's run in
MLflow by its id, or the folder of a training or checkpoint. Without --yes the hub gets nothing: what would go there is
shown. Its token comes from HF_TOKEN. No Ray is started.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.command import make_parser, run_plainly, set_environment

KINDS = ("gguf", "folder", "hub")


def export(options: argparse.Namespace) -> None:
    """Open the model, say what other programs cannot take of it, and write or upload it."""
    from model.families import load_config as load_model_config
    from model.gguf import head_size_notes
    from pipeline import tracking
    from pipeline.config import load_config
    from pipeline.export.sources import open_source

    config = load_config(options.preset, options.settings)
    is_folder = "/" in options.model or Path(options.model).is_dir()
    if options.model.startswith("models:") or not is_folder:
        tracking.connect(config)
    with open_source(config, options.model) as source:
        model_config, _ = load_model_config(source.folder)
        for note in head_size_notes(model_config):
            print(f"Mind: {note}")
        if options.to == "gguf":
            export_gguf(options, source.folder, source.name)
        elif options.to == "folder":
            export_folder(options, source.folder, source.name)
        else:
            export_to_hub(options, source.folder, source.name)


def export_gguf(options: argparse.Namespace, folder: Path, name: str) -> None:
    from model.gguf import write_gguf, write_modelfile

    target = Path(options.output)
    file = target / f"{name}-{options.type}.gguf"
    pattern = write_gguf(folder, file, options.type, name)
    write_modelfile(folder, file, target / "Modelfile")
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB; every probe has the same tokens under llama.cpp's {pattern}.")
    print(f"llama-server -m {file}")
    print(f"ollama create {name} -f {target / 'Modelfile'}")


def export_folder(options: argparse.Namespace, folder: Path, name: str) -> None:
    from pipeline.export.folder import write_folder

    files = write_folder(folder, Path(options.output), name)
    print(f"{options.output}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")


def export_to_hub(options: argparse.Namespace, folder: Path, name: str) -> None:
    from pipeline.export.folder import write_folder
    from pipeline.export.hub import plan_upload

    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        write_folder(folder, Path(scratch), options.repository.rpartition("/")[2])
        upload = plan_upload(Path(scratch), options.repository, private=options.private)
        print(upload.describe())
        if options.yes:
            print(f"Uploaded: {upload.run(f'Upload {name}')}")
        else:
            print("Nothing was uploaded; the same command with --yes does it.")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("model", help="models:/name@alias, a number or alias, a run's id, or a folder")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over the preset")
    parser.add_argument("--preset", default="demo", help="[%(default)s]")
    parser.add_argument("--to", choices=KINDS, required=True, help="what it becomes")
    parser.add_argument("--type", choices=("f16", "bf16", "q8_0"), default="f16", help="of gguf [%(default)s]")
    parser.add_argument("--output", metavar="FOLDER", help="of gguf and folder: where to write")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="of hub: what to upload to")
    parser.add_argument("--private", action="store_true", help="of hub: make a repository that only you can read")
    parser.add_argument("--yes", action="store_true", help="of hub: upload what was shown")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_intermixed_args(argv)
    wanted = "repository" if options.to == "hub" else "output"
    if not getattr(options, wanted):
        parser.error(f"--to {options.to} needs --{wanted}")
    set_environment()
    return run_plainly(lambda: export(options))


if __name__ == "__main__":
    sys.exit(main())
