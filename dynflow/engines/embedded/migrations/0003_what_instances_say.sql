-- What an instance's row says, its start and its end, is not in `history` again. Rows from before stay there.

ALTER TABLE instances ADD COLUMN started_event INTEGER;
ALTER TABLE instances ADD COLUMN ended_event INTEGER;
