"""A row that is not taken, as the pool keeps it: Row + reason -> Rejection."""

from delia.schema import MAX_REJECTED_TEXT, Rejection, Row


def reject(row: Row, reason: str) -> Rejection:
    """Return the rejection of a row, with the beginning of its instruction as the text."""
    return Rejection(
        row_id=row.row_id,
        index=row.index,
        source=row.source,
        reason=reason,
        text=row.instruction[:MAX_REJECTED_TEXT],
        num_output_tokens=row.num_output_tokens,
    )
