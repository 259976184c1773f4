"""Compile the contract: Python stubs into clients/python, and an image that buf lints.

    python proto/generate.py            write clients/python/{alto/v1,buf/validate}
    python proto/generate.py --check    fail if what is there differs from what would be written
    python proto/generate.py --image F  write a FileDescriptorSet with comments, for buf and for other languages

The rules of protovalidate come from the installed wheel: it ships the descriptor of buf/validate/validate.proto, not
its source, so the compiler is given descriptors.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROTO_ROOT = Path(__file__).resolve().parent
PYTHON_ROOT = PROTO_ROOT.parent / "clients" / "python"
GENERATED = ("alto/v1", "buf/validate")


def write_dependencies(path: Path) -> None:
    """Write a FileDescriptorSet of everything that alto/v1 imports."""
    from google.protobuf import any_pb2, descriptor_pb2, duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2
    from protovalidate._gen.buf.validate import validate_pb

    files = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, any_pb2, duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.add().ParseFromString(validate_pb._DESC.proto.to_binary())
    path.write_bytes(files.SerializeToString())


def compile_contract(dependencies: Path, *options: str, files: list[str]) -> None:
    """Run protoc over `files`."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO_ROOT}", f"--descriptor_set_in={dependencies}"]
    subprocess.run([*command, *options, *files], check=True)


def contract_files() -> list[str]:
    """Return the contract's files, relative to the proto root."""
    return sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.glob("alto/v1/*.proto"))


def write_python(target: Path, dependencies: Path) -> None:
    """Write the Python stubs and their types below `target`."""
    plugins = Path(sys.executable).parent
    compile_contract(
        dependencies,
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet:{target}",
        files=contract_files(),
    )
    compile_contract(dependencies, f"--python_out={target}", files=["buf/validate/validate.proto"])
    for stub in target.glob("alto/v1/*_pb2_grpc.py*"):
        if not any(line.startswith("service ") for line in (PROTO_ROOT / proto_of(stub)).read_text().splitlines()):
            stub.unlink()
    (target / "alto" / "v1" / "__init__.py").write_text(
        '"""Generated from proto/alto/v1 by `make proto`. Do not edit."""\n'
    )


def proto_of(stub: Path) -> str:
    """Return the proto file that a generated gRPC stub came from."""
    return f"alto/v1/{stub.name.split('_pb2_grpc')[0]}.proto"


def differences(left: Path, right: Path) -> list[str]:
    """Return the names of generated files that differ between two trees."""
    comparison = filecmp.dircmp(left, right, ignore=["__pycache__"])
    _, mismatched, unreadable = filecmp.cmpfiles(left, right, comparison.common_files, shallow=False)
    return sorted([*comparison.left_only, *comparison.right_only, *mismatched, *unreadable])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compile the contract.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--image", type=Path, help="write a FileDescriptorSet with comments here, and nothing else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        dependencies = scratch / "dependencies.binpb"
        write_dependencies(dependencies)
        if arguments.image:
            options = ("--include_imports", "--include_source_info", f"--descriptor_set_out={arguments.image}")
            compile_contract(dependencies, *options, files=contract_files())
            return 0
        fresh = scratch / "python"
        fresh.mkdir()
        write_python(fresh, dependencies)
        if arguments.check:
            stale = [f"{name}/{file}" for name in GENERATED for file in differences(fresh / name, PYTHON_ROOT / name)]
            for file in stale:
                print(f"clients/python/{file} is not what proto/ generates: run `make proto`", file=sys.stderr)
            return 1 if stale else 0
        for name in GENERATED:
            shutil.rmtree(PYTHON_ROOT / name, ignore_errors=True)
            shutil.copytree(fresh / name, PYTHON_ROOT / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
