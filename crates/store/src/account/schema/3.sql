-- Only what is open is here, and it is looked up by replica when one has died: a
-- scan then costs less than an index at each request.
DROP INDEX reservation_replica;

-- Who settled it; for one that died, who had admitted it.
ALTER TABLE usage ADD COLUMN replica TEXT;
