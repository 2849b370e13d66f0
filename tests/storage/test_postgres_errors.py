"""The table of errors: each belongs to a statement, a session, a connection or the server."""

import psycopg
import pytest

from storage.postgres.errors import SQLSTATES, Belongs, belongs_to, shows_a_pooler

CASES = [
    ("08006", Belongs.CONNECTION),  # connection failure
    ("08P01", Belongs.CONNECTION),  # protocol violation: PgBouncer's own errors
    ("0A000", Belongs.SESSION),  # cached plan must not change result type
    ("22P02", Belongs.STATEMENT),  # invalid text representation
    ("23505", Belongs.STATEMENT),  # unique violation
    ("23514", Belongs.STATEMENT),  # check violation
    ("25001", Belongs.SESSION),  # active SQL transaction
    ("25006", Belongs.CONNECTION),  # read-only SQL transaction
    ("25P02", Belongs.SESSION),  # in failed SQL transaction
    ("25P03", Belongs.CONNECTION),  # idle in transaction session timeout
    ("25P04", Belongs.CONNECTION),  # transaction timeout
    ("26000", Belongs.SESSION),  # invalid SQL statement name
    ("28P01", Belongs.SERVER),  # invalid password
    ("3D000", Belongs.SERVER),  # invalid catalog name
    ("40001", Belongs.CONTENTION),  # serialization failure
    ("40P01", Belongs.CONTENTION),  # deadlock detected
    ("42501", Belongs.STATEMENT),  # insufficient privilege
    ("42703", Belongs.STATEMENT),  # undefined column
    ("42P01", Belongs.STATEMENT),  # undefined table
    ("42P05", Belongs.SESSION),  # duplicate prepared statement
    ("53100", Belongs.SERVER),  # disk full
    ("53300", Belongs.SERVER),  # too many connections
    ("55P03", Belongs.CONTENTION),  # lock not available
    ("57014", Belongs.CONTENTION),  # query canceled
    ("57P01", Belongs.CONNECTION),  # admin shutdown
    ("57P02", Belongs.CONNECTION),  # crash shutdown
    ("57P03", Belongs.CONNECTION),  # cannot connect now
    ("57P05", Belongs.CONNECTION),  # idle session timeout
    ("58030", Belongs.SERVER),  # I/O error
    ("SV002", Belongs.STATEMENT),  # our own: chat_audit is append-only
    ("XX000", Belongs.SESSION),  # internal error, such as "cache lookup failed"
    ("XX001", Belongs.STATEMENT),  # data corrupted
]


def error_with(sqlstate: str) -> psycopg.Error:
    error = psycopg.DatabaseError()
    error.sqlstate = sqlstate
    return error


@pytest.mark.parametrize(("sqlstate", "belongs"), CASES)
def test_a_sqlstate_belongs_where_the_table_says(sqlstate: str, belongs: Belongs):
    assert belongs_to(error_with(sqlstate)) is belongs


def test_every_row_of_the_table_has_a_case():
    for key in SQLSTATES:
        assert any(case.startswith(key) for case, _ in CASES), key


@pytest.mark.parametrize(
    ("error", "belongs"),
    [
        (psycopg.OperationalError(), Belongs.CONNECTION),
        (psycopg.InterfaceError(), Belongs.CONNECTION),
        (psycopg.DataError(), Belongs.STATEMENT),  # such as a NUL in a text
        (psycopg.ProgrammingError(), Belongs.STATEMENT),  # such as a type that it cannot send
    ],
)
def test_without_a_sqlstate_libpq_lost_the_connection_or_psycopg_refused_a_parameter(
    error: psycopg.Error, belongs: Belongs
):
    assert belongs_to(error) is belongs


def test_only_mixed_up_prepared_statements_show_a_pooler():
    shown = [sqlstate for sqlstate, _ in CASES if shows_a_pooler(error_with(sqlstate))]
    assert shown == ["26000", "42P05"]
