"""One self-contained page about one or several runs, made from their files alone."""

from __future__ import annotations

from train.report.page import write as write
