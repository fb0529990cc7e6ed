"""`dynbox completion SHELL`: the script that makes a shell complete verbs, flags and names."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_box.cli import complete, output
from dynamo_box.errors import ExitCode, UsageError

app = complete.verb()

HOW = {
    "bash": 'add this line to ~/.bashrc:  eval "$(dynbox completion bash)"',
    "zsh": 'add this line to ~/.zshrc, after compinit:  eval "$(dynbox completion zsh)"',
    "fish": "write it into a file:  dynbox completion fish > ~/.config/fish/completions/dynbox.fish",
}


@app.command()
def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish", autocompletion=complete.shells)],
) -> ExitCode:
    """Print the completion script for a shell. For bash: eval "$(dynbox completion bash)"."""
    if shell not in HOW:
        raise UsageError(f"no completion for {shell!r}", remedy=f"shells: {', '.join(HOW)}")
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # its home is private

    script = get_completion_script(prog_name="dynbox", complete_var="_DYNBOX_COMPLETE", shell=shell)
    output.text(f"# {HOW[shell]}\n{script}")
    return ExitCode.OK
