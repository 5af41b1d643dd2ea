"""A report on one run or several: one self-contained HTML page, made from their workdirs."""

from gemma_encoder.report.page import render_report as render_report
