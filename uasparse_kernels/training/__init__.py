"""Recipes on top of `uasparse_kernels`: data, networks, sparse training, the vote, and how to judge the result.

Thin by intent: everything here can be replaced by a user's own loop. `uasparse --help` is the entrance, in a
checkout also `python -m training --help`.
The method is that of Lei, Xu, Zhang and Mallick, "Embracing Unknown Step by Step", arXiv 2403.20047.
"""


def main() -> None:
    """The command line."""
    try:
        from uasparse_kernels.training.__main__ import main as run
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error}: pip install 'uasparse_kernels[training]' brings what the command line needs."
        ) from None
    run()
