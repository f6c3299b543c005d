"""Transformers' own OpenAI-compatible server, on a fused folder."""

from collections.abc import Sequence
from pathlib import Path

from modeling_ultrafuser import UltraFuserForCausalLM

from .folders import fused_config


def serve(folder: str, arguments: Sequence[str] = ()) -> None:
    """Serves a fused folder with `transformers serve` until it is stopped.

    The server looks a model's class up by its name among transformers' own, so the class is put there. And as it
    serves one model and refuses the name of any other, it lists that one, instead of all that are in the Hub's cache.

    Args:
        folder: Of a fused model, and its name in requests.
        arguments: Of `transformers serve`: `--port`, `--continuous-batching` and so on.

    Raises:
        ModuleNotFoundError: If a package that the server needs is not installed.
        ValueError: If the folder is no fused model's, or its path cannot be a model's name there.
    """
    # what transformers' server asks for only once it runs, and then not by the name of our extra
    import fastapi  # noqa: F401
    import openai  # noqa: F401
    import uvicorn  # noqa: F401

    fused_config(folder)
    if "@" in folder or ".gguf" in folder:
        raise ValueError(
            f"The server takes what follows an @ in a model's name for a revision, and .gguf for a format, but the "
            f"folder is {folder!r}. Rename it, or go to the folder that holds it and give the rest of the path."
        )
    import transformers
    import typer
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    transformers.UltraFuserForCausalLM = UltraFuserForCausalLM
    listed = {"id": folder, "object": "model", "created": int(Path(folder).stat().st_mtime), "owned_by": "ultrafuser"}
    ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [listed])
    server = typer.Typer(pretty_exceptions_enable=False)
    server.command()(Serve)
    server([folder, *arguments], standalone_mode=False)
