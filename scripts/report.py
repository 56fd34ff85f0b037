"""Report on runs."""

from nemo_prolong.config.cli import hydra_script
from nemo_prolong.config.schema import ReportConfig

DESCRIPTION = """\
Put the losses, perplexities, recall and throughput of a chain of runs on one offline HTML page, with summary.json."""

EXAMPLES = [
    "python scripts/report.py",
    "python scripts/report.py 'runs=[runs/stage1,runs/stage2,runs/sft]' exported=null output=report.html",
]


def run(cfg: ReportConfig, overrides: list[str]) -> None:
    """Write the report."""
    from nemo_prolong.report.training.run import write_report

    page, summary = write_report(cfg)
    print(f"{page}, and its numbers in {summary}")


def main() -> None:
    """Read the command line."""
    hydra_script(ReportConfig, "report", run, DESCRIPTION, EXAMPLES)


if __name__ == "__main__":
    main()
