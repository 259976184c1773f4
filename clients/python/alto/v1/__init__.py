"""Generated from proto/alto/v1 by `make proto`. Do not edit."""
