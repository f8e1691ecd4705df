-- Takes the right to have a person authorize the app for a token, which is not refreshed meanwhile.
-- ask: chain (of the grant to come), facts, sealed (what completes it), state_hash, valid_us (how long), takeover_us, budgets;
--      and etag_chain with etag_generation, or replace, or neither
-- Answers OK with `until_us`; TOKEN_NOT_FOUND; EXISTS; CHANGED; or WAIT with `reason` and `until_us`.
local token, lease = settle(id)
if not token then return answer('TOKEN_NOT_FOUND') end
local grant, before = load_grant(id), load_authorization(id)
local kept = is_kept(grant)
if ask.etag_chain and not (kept and is_meant(grant)) then return answer('CHANGED') end
if kept and not ask.replace and not ask.etag_chain then return answer('EXISTS') end

local function wait(reason, until_us) return answer('WAIT', {reason = reason, until_us = until_us}) end
local over = exchange_until(before) or right_until(grant)
if over and sure < over then return wait('REFRESHING', over_at(over)) end
if lease then return wait('LEASED', number(lease.expires_us)) end
if not before or before.step == 'PENDING' then free_cooldown(token, before) end
local lost = lost_at(grant) + number(token.interval_us)
if sure < lost then return wait('COOLING', over_at(lost)) end
local reason, held_until = held_by(token)
if reason then return wait(reason, held_until) end
local spent = spent_until()
if spent then return wait('BUDGET_SPENT', spent) end

redis.call('DEL', authorization_key(id))
note_hold(ask.valid_us + ask.takeover_us)
hold_cooldown(token, lease, {}, {
  chain = ask.chain, kept_chain = kept and grant.chain or '', facts = ask.facts, sealed = ask.sealed,
  state_hash = ask.state_hash, step = 'PENDING', attempt = '', valid_us = now + ask.valid_us, until_us = now + ask.valid_us, begun_us = now,
})
redis.call('PEXPIRE', authorization_key(id), us(math.ceil((ask.valid_us + CLOCK_SLACK) / 1000)))
audit('AUTHORIZATION_BEGAN', token_name(id), {}, true)
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK', {until_us = now + ask.valid_us})
