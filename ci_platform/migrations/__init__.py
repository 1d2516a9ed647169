"""The path of the database's schema to what `model.py` says, in Alembic's form."""
