"""The page of compatibility says what the tests have checked."""

from compatibility import PAGE, page


def test_the_page_is_made_of_the_rows_of_the_tests():
    assert PAGE.read_text() == page(), "write it anew by: python tests/compatibility.py"
