"""Which commit a figure says it belongs to."""

import subprocess

from bench.commit import commit


def test_saved_results_make_no_commit_dirty(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    assert commit(tmp_path) == "unknown"
    (tmp_path / "results").mkdir()
    code, results = tmp_path / "code.py", tmp_path / "results" / "rows.json"
    for path in (code, results):
        path.write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    clean = commit(tmp_path)
    results.write_text("2")
    (tmp_path / "new.py").write_text("1")
    assert commit(tmp_path) == clean != "unknown"
    code.write_text("2")
    dirty = commit(tmp_path)
    assert dirty.startswith(f"{clean}-dirty-")
    code.write_text("3")
    assert dirty != commit(tmp_path)
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(tmp_path))
        assert commit(tmp_path) == "unknown"  # no git on the machine
    monkeypatch.setenv("UNIKE_COMMIT", "told")  # of a copy without its own history
    assert commit(tmp_path) == "told"
