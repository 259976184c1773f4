"""A node whose TLS settings will not do says which of them, and does not start."""

from certificates import Authority, as_settings
from processes import why_it_does_not_start


def test_roots_that_hold_no_certificate_are_told(tmp_path):
    authority = Authority(tmp_path / "ours")
    files = authority.issue("node", roots=tmp_path / "roots.pem")
    files.roots.write_text("nonsense")
    named = {"ALTO_NODE_SERVICE_TOKEN": "PASSWORD", **as_settings(files, "ALTO_NODE_")}
    last = why_it_does_not_start("alto_training", tmp_path / "home", named)
    assert last.startswith(f"alto-node: ALTO_NODE_TLS_ROOTS: {files.roots} holds no certificate in PEM: give ")
