-- Ends custody. A tombstone keeps the generation and when the same refresh token may be sent again, and
-- the token its cooldown.
-- ask: takeover_us; and etag_chain with etag_generation, or neither
-- Answers OK; GONE; CHANGED; or WAIT with `until_us` while a request is under way.
local token, lease = settle(id)
local grant = load_grant(id)
if not token or not is_kept(grant) then return answer('GONE') end
if not is_meant(grant) then return answer('CHANGED') end
local over = exchange_until(load_authorization(id)) or right_until(grant)
if over and sure < over then return answer('WAIT', {reason = 'REFRESHING', until_us = over_at(over)}) end
shared.count(id, token)
if (token.running or 0) > 0 then
  local last_end = redis.call('ZRANGE', shared.key(id), -1, -1, 'WITHSCORES')[2]
  return answer('WAIT', {reason = 'LEASED', until_us = over_at(number(last_end))})
end
if lost_at(grant) > 0 then cool_down(id, token, lost_at(grant), number(token.interval_us)) end
redis.call('HDEL', PRINTS, grant.fingerprint)
redis.call('DEL', authorization_key(id))
end_hold(token)
keep_grant(grant, {
  sealed_grant = '', sealed_access = '', facts = '', fingerprint = '', past_print = grant.fingerprint, claim = '', expires_us = 0, attempt_step = '',
  refreshed_us = math.max(grant.refreshed_us, lost_at(grant)),
})
redis.call('HDEL', token_key(id), 'custody_us', 'most_runs')
token.custody_us = nil
mirror(id, token, lease)
wake_next(id)
audit('GRANT_DELETED', token_name(id), {}, true)
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK')
