"""All SQL of admission, for SQLite and PostgreSQL alike: `schema` has the tables, the other files one theme each."""
