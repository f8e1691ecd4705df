-- Brings the records of a shard up to this release, which common.lua has done.
-- Answers the schema that was found, and the one that is there now.
return reply('OK', us(epoch and found_schema or SCHEMA), us(SCHEMA))
