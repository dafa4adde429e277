"""The `ochat` command. Each command reads its arguments and calls one function; heavy imports stay inside."""

import shlex
import sys
from typing import Annotated

import typer

from ochat.errors import OchatError
from ochat.log import setup_logging

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML experiment")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.path=value]...", help="override values")]


@app.command()
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the whole configuration, defaults and overrides filled in."""
    from ochat.config import dump_config, load_config

    print(dump_config(load_config(config, overrides or ())), end="")


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn chat files into the prepared dataset, and say what became of every conversation."""
    from ochat.config import load_config
    from ochat.data.prepare import prepare
    from ochat.data.report import print_report

    loaded = load_config(config, overrides or ())
    print_report(loaded, prepare(loaded))
    arguments = shlex.join([config, *(overrides or ())])
    print(f"\nnext: deepspeed --module ochat.training.train --config {arguments}")
    print(f"  or, in one process: ochat train {arguments}")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train in this process, preparing the data first if need be. For several processes use the deepspeed launcher."""
    from ochat.config import load_config
    from ochat.training.train import train_here

    loaded = load_config(config, overrides or ())
    train_here(loaded, shlex.join(["ochat", "prepare", config, *(overrides or ())]))
    print(f"\nnext: ochat chat {loaded.run_dir}")


@app.command()
def chat(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="run folder or exported model")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="ask this one thing and exit")] = None,
    condition: Annotated[str, typer.Option(help="class to answer as; default: the model's")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
) -> None:
    """Talk to a trained model."""
    from ochat.serving.chat import Sampling, load_chat
    from ochat.serving.terminal import run_terminal

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    run_terminal(load_chat(checkpoint), condition=condition, sampling=sampling, message=message)


@app.command(name="add-tokens")
def add_tokens(
    base: Annotated[str, typer.Argument(metavar="BASE", help="folder or hub name of a pretrained model")],
    template: Annotated[str, typer.Option(help="whose control tokens to add")],
    to: Annotated[str, typer.Option(metavar="DIR", help="new folder")],
) -> None:
    """Copy a base model with the control tokens a template needs, each on an embedding row that can be trained."""
    from ochat.add_tokens import add_tokens

    print(add_tokens(base, template=template, to=to).report())
    print(f"\nnext: ochat train CONFIG model.name_or_path={shlex.quote(to)} model.template={template}")


def main() -> None:
    """Entry of the console script: an OchatError is one paragraph on stderr and exit code 2."""
    setup_logging()
    try:
        app()
    except (OchatError, OSError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        sys.exit(2)
