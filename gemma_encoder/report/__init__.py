"""Self-contained HTML report on one or several runs, built from the files in their workdirs."""

from gemma_encoder.report.page import render_report as render_report
