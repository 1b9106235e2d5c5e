"""What SECURITY.md says of the source: no remote code, nothing unpickled, no text run as code."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "blip2fast"
# the one file that builds the keywords of `torch.load` apart from its calls
APART = "frozen/lavis_files.py"


@cache
def calls() -> list[tuple[str, str, dict[str, str]]]:
    """Of every call in the package: where it is, what is called, its keywords."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {k.arg or "**": ast.unparse(k.value) for k in node.keywords}
                found.append((f"{file}:{node.lineno}", ast.unparse(node.func), keywords))
    return found


def test_code_of_models_is_never_run() -> None:
    loading = [
        (where, keywords)
        for where, called, keywords in calls()
        if called.endswith((".from_pretrained", ".from_config")) and called.startswith("Auto")
    ]
    assert len(loading) > 20
    assert [w for w, k in loading if k.get("trust_remote_code") != "False"] == []
    every = [k["trust_remote_code"] for _, _, k in calls() if "trust_remote_code" in k]
    assert set(every) == {"False"}


def test_only_tensors_are_unpickled() -> None:
    found = [(where, k) for where, called, k in calls() if called == "torch.load"]
    assert len(found) >= 3
    bad = [w for w, k in found if k.get("weights_only") != "True" and not w.startswith(APART)]
    assert bad == []
    assert '"weights_only": True}' in (PACKAGE / APART).read_text()
    unpickling = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "np.load")
    assert [w for w, called, k in calls() if called in unpickling or "allow_pickle" in k] == []


def test_no_text_is_run_as_code() -> None:
    runs = ("eval", "exec", "compile", "os.system", "yaml.unsafe_load", "yaml.full_load")
    assert [where for where, called, _ in calls() if called in runs] == []
    assert [w for w, called, k in calls() if "subprocess" in called and "shell" in k] == []
    assert [w for w, called, _ in calls() if called.endswith(".extractall")] == []
    loaders = {k.get("Loader") for _, called, k in calls() if called == "yaml.load"}
    assert loaders == {"_Loader"}  # training/config_files.py: a yaml.SafeLoader
