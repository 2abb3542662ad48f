"""The report: figures, tables and their sources on one page, from evaluation files and run folders."""
