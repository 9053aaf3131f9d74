-- Costs are exact: decimal text in place of a binary float. `route` is JSON: why
-- the request went where it went.
ALTER TABLE response ADD COLUMN exact TEXT;
UPDATE response SET exact = printf('%.12f', cost) WHERE cost IS NOT NULL;
ALTER TABLE response DROP COLUMN cost;
ALTER TABLE response RENAME COLUMN exact TO cost;
ALTER TABLE response ADD COLUMN route TEXT;
