"""Plain-text tables of an evaluation's results, for a terminal."""

from clex_train.evaluation.report.tables import console as perplexity_table
from clex_train.evaluation.report.tables import from_results
from clex_train.evaluation.results import Origin, Results
from clex_train.evaluation.retrieval.console import console as retrieval_table


def tables_of(results: Results, origin: Origin) -> str:
    """Format the perplexity table and the retrieval table, as far as there are scores."""
    perplexity = [perplexity_table(from_results(results, origin))] if results.scores else []
    retrieval = [retrieval_table(results.tasks)] if results.tasks else []
    return "\n\n".join([*perplexity, *retrieval])
