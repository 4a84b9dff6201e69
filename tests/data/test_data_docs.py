import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_python_of_the_page_runs_as_it_is(tmp_path, monkeypatch):
    if not PAGE.exists():
        pytest.skip("docs/data.md is not beside the tests")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    page: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), page)
