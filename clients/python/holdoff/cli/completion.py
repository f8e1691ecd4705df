"""`holdoff completion`: the completion script of a shell."""

import click
from click.shell_completion import FishComplete, get_completion_class

from holdoff.cli._help import example

_SHELLS = ("bash", "zsh", "fish", "powershell")

_PROGRAMS = {
    "holdoff": "_HOLDOFF_COMPLETE",
    "holdoff-coordinator": "_HOLDOFF_COORDINATOR_COMPLETE",
}


class _Fish(FishComplete):
    """Click's script of fish cuts descriptions at their first comma; this one does not."""

    source_template = FishComplete.source_template.replace(
        'string split ","', 'string split --max 1 ","'
    )


@click.command(
    epilog=example("holdoff completion bash", "holdoff completion fish", "holdoff completion zsh")
)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL: bash, zsh, fish or powershell.

    Install it with the line of your shell, and start a new one:

    \b
    bash        echo 'eval "$(holdoff completion bash)"' >> ~/.bashrc
    zsh         echo 'eval "$(holdoff completion zsh)"' >> ~/.zshrc    (after compinit)
    fish        holdoff completion fish > ~/.config/fish/conf.d/holdoff.fish
    powershell  'holdoff completion powershell | Out-String | iex' >> $PROFILE

    It completes holdoff and holdoff-coordinator. Names of tokens and leases are completed too, if
    the coordinator answers within a second.
    """  # noqa: D301 - click wants the backspace itself
    kind = _Fish if shell == "fish" else get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    for program, variable in _PROGRAMS.items():
        # A script says how to ask a program, and nothing about what the program answers.
        click.echo(kind(ctx.find_root().command, {}, program, variable).source())
