"""`holdoff completion`: the completion script of a shell."""

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL: bash, zsh or fish.

    Install it with the line of your shell, and start a new one:

    \b
    bash  echo 'eval "$(holdoff completion bash)"' >> ~/.bashrc
    zsh   echo 'eval "$(holdoff completion zsh)"' >> ~/.zshrc    (after compinit)
    fish  holdoff completion fish > ~/.config/fish/completions/holdoff.fish

    Names of tokens and leases are completed too, if the coordinator answers within a second.
    """  # noqa: D301 - click wants the backspace itself
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(ctx.find_root().command, {}, "holdoff", "_HOLDOFF_COMPLETE").source())
