-- Ends custody. A tombstone keeps generation and not-before, so that a grant put again still waits.
-- ask: etag_chain and etag_generation, or neither
-- Answers OK, GONE, CHANGED, or WAIT while a request is under way.
local grant = load_grant(id)
if not is_kept(grant) then return answer('GONE') end
if ask.etag_chain and (grant.chain ~= ask.etag_chain or grant.generation ~= ask.etag_generation) then
  return answer('CHANGED')
end
redis.call('HDEL', SHARD .. ':fingerprints', grant.fingerprint or '')
keep_grant(grant, {sealed = '', facts = '', fingerprint = '', attempt_step = '', expires_us = 0})
audit('GRANT_DELETED', token_name(id), {}, true)
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK')
