"""import: read a public speculator into a checkpoint of this project."""

from pathlib import Path

import click

from spec.errors import SpecError
from stages import common


@click.command("import")
@click.argument("source", metavar="SRC")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", default=None, help="Its base, a folder or hub id: to compare widths and keep its digest.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the base's folder.")
def import_(source: str, out: Path, base: str | None, trust_remote_code: bool) -> None:
    """Read the speculator in SRC, a folder or hub id, into the new folder OUT.

    SRC is in IBM's layout (MLPSpeculatorPreTrainedModel), in ArcticTraining's or ArcticInference's, or an EAGLE-3 head
    as vLLM loads it. Give OUT to model.speculator.init, `spec generate --checkpoint` or `spec export --checkpoint`.
    """
    from spec import export, heads

    common.show_log()
    with common.clear_errors():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SpecError(f"{out} is not empty; name a folder that is empty or not there")
        known = None if base is None else export.identify_base(base, trust_remote_code)
        speculator = export.read(source, known)
        heads.save(speculator, out)
    config = speculator.config
    weights = f"weights {config.base_digest[:16]}" if config.base_digest else "weights not known; --base names them"
    common.say(
        f"import: {config.method} with {config.n_predict} heads, {speculator.num_parameters() / 1e6:.1f} M parameters, "
        f"for {config.base_model_name_or_path} ({weights}) -> {out}"
    )
