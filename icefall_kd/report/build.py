"""The report of a training: one page from what its exp_dir holds."""

from pathlib import Path

from icefall_kd.config import ReportConfig
from icefall_kd.errors import ConfigError
from icefall_kd.report.hkd import hkd_sections
from icefall_kd.report.mvq import mvq_sections
from icefall_kd.report.nar import nar_sections
from icefall_kd.report.page import code, page
from icefall_kd.report.training import losses_section, options_section, read_log, results_section, trained_section
from icefall_kd.results import read_run
from icefall_kd.results_names import system_name
from icefall_kd.runtime.files import write_text


def write_report(config: ReportConfig) -> Path:
    """Write the page and return its path; an earlier one is replaced at once.

    Raises:
        ConfigError: there is no such exp_dir.
        DataError: it holds no log of a training, or a file in it is damaged.
    """
    if not config.exp_dir.is_dir():
        raise ConfigError(f"--exp-dir {config.exp_dir} does not exist; train first")
    run, records = read_run(config.exp_dir), read_log(config.exp_dir)
    results = results_section(run, [read_run(other) for other in config.compare_with])
    sections = [trained_section(run), results, losses_section(records)]
    system = run.config["system"]
    if system == "mvq":
        sections += mvq_sections(run, records)
    elif system == "nar":
        sections += nar_sections(run)
    elif system == "hkd":
        sections += hkd_sections(run, config)
    sections.append(options_section(run.config))
    out = config.out or config.exp_dir / "report.html"
    title = f"{system_name(run.config, run.labels, run.start)}: {config.exp_dir.resolve().name}"
    write_text(out, page(title, f"Training in {code(config.exp_dir)}", sections))
    return out
