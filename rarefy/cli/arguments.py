"""The arguments that several verbs share, with one wording."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face name, a folder, a GGUF file, or 'demo' (the embedded SmolLM2-135M).")]
Out = Annotated[str, typer.Option(help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table: the same figures.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, ...")]
Calibration = Annotated[str | None, typer.Option(help="A UTF-8 text file; default: the embedded Wikipedia articles.")]
CalibrationTokens = Annotated[int, typer.Option(help="Calibration tokens.", min=1)]
Text = Annotated[str | None, typer.Option(help="A UTF-8 text file; default: the embedded held-out articles.")]
Tokens = Annotated[int, typer.Option(help="Held-out tokens to score; a quoted figure wants 16384.", min=2)]
Seed = Annotated[int, typer.Option(help="Of every random choice.", min=0, max=2**31 - 1)]
