"""Commands that bring a data set to others and from others."""

from pathlib import Path
from typing import Annotated

import typer

from bytecache.pipeline.cli.options import Given, refusals, takes_settings
from bytecache.pipeline.cli.terminal import say
from bytecache.pipeline.units.progress import human_bytes
from bytecache.schemas.files import local_path

app = typer.Typer()


@app.command()
@takes_settings()
def push(
    given: Given,
    place: Annotated[str, typer.Argument(help="hf://datasets/OWNER/NAME[@REVISION][/FOLDER].")],
    folder: Annotated[str, typer.Argument(help="A folder with dataset.json, or a run folder; default: run.dir.")] = "",
    private: Annotated[bool, typer.Option("--private", help="A repository made by this push is private.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of another data set there.")] = False,
) -> None:
    """Send a data set to the Hugging Face hub: what it lists and nothing else, only what is not there yet.

    Reads: the data set, every hash of it first. Writes: the repository, its index last; a push that broke off goes on.
    The token comes from HF_TOKEN or from `hf auth login`.

    Example: bytecache push hf://datasets/me/books-bytes --run-dir runs/books
    """
    with refusals():
        from bytecache.pipeline.commands import share

        settings = given.settings(of_run=False)
        source = share.data_set_folder(folder, settings.run.dir)
        redirects = settings.dataset.private_redirects
        pushed = share.push(source, place, private=private, replace=replace, private_redirects=redirects, say=say)
        removed = f", {pushed.removed} of the data set before it removed" if pushed.removed else ""
        say(
            f"push: {place}: {pushed.sent} files sent ({human_bytes(pushed.n_bytes)}), {pushed.present} were "
            f"there{removed}"
        )
        if pushed.strangers:
            say(f"push: {len(pushed.strangers)} files are no part of it, not sent: {', '.join(pushed.strangers)}")


@app.command()
@takes_settings(run_dir=False)
def pull(
    given: Given,
    place: Annotated[str, typer.Argument(help="A folder or URL with dataset.json (hf://, s3://, https://, ...).")],
    folder: Annotated[Path, typer.Argument(help="Where the copy goes.")],
) -> None:
    """Make a whole local copy of a data set, every shard checked by its hash.

    Reads: the data set. Writes: the folder, its index last; a pull that broke off goes on where it was. A redirect to
    an address of a private network is followed with --set dataset.private_redirects=true alone.

    Example: bytecache pull hf://datasets/me/books-bytes books-bytes
    """
    with refusals():
        from bytecache.pipeline.commands import share

        redirects = given.settings(of_run=False).dataset.private_redirects
        fetched, present = share.pull(place, local_path(folder), say, private_redirects=redirects)
        say(f"pull: {folder}: whole; {fetched} shards fetched, {present} were there")
