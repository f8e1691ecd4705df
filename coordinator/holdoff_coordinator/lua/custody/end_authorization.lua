-- Ends an authorization without a grant, or, if its code was not sent, lets it be completed yet.
-- ask: chain, attempt ('' if there was none), result (CANCELLED, REFUSED, ISSUED, NOT_SENT or UNPROVEN), outcome,
--      refreshed_age_us of an access token that was issued, -1 if none was
-- Answers OK or GONE.
local token, lease = settle(id)
local authorization = load_authorization(id)
if not token or not authorization then return answer('GONE') end
if authorization.chain ~= ask.chain or authorization.attempt ~= ask.attempt then return answer('GONE') end
if authorization.step == 'DONE' then return answer('GONE') end
free_cooldown(token, authorization)
if ask.result == 'NOT_SENT' then
  hold_cooldown(token, lease, authorization, {step = 'PENDING', attempt = '', until_us = authorization.valid_us})
  return answer('OK')
end
redis.call('DEL', authorization_key(id))
end_hold(token)
if ask.result == 'UNPROVEN' then -- it may have been answered at the last possible moment
  put(token_key(id), token, {
    last_refresh_us = now, not_before_us = math.max(number(token.not_before_us), authorization.until_us),
  })
else
  put(token_key(id), token, {not_before_us = token.not_before_us})
  if ask.refreshed_age_us >= 0 then
    cool_down(id, token, now - ask.refreshed_age_us, number(token.interval_us))
  end
end
mirror(id, token, lease)
wake_next(id)
audit('AUTHORIZATION_FAILED', token_name(id), {reason = ask.outcome}, true)
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK')
