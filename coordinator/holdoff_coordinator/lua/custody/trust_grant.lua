-- Takes the word of an operator that the refresh token in the store is the newest one.
-- ask: etag_chain with etag_generation, or neither
-- Answers OK; GONE; or CHANGED.
local token = settle(id)
local grant = load_grant(id)
if not token or not is_kept(grant) then return answer('GONE') end
if not is_meant(grant) then return answer('CHANGED') end
local changes = {evidence_us = now}
if grant.condition == 'STALE' then changes.condition, changes.message, changes.since_us = 'READY', '', now end
keep_grant(grant, changes)
audit('GRANT_TRUSTED', token_name(id), {}, true)
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK')
