-- Takes room from budgets before a call; what is refused leaves no trace.
-- ARGV 7.. reservation id, fingerprint of caller and parameters, TTL µs, how
--         much, budgets as JSON, hash of the caller, token id, place as JSON; for one that
--         was acknowledged before, and that the store may have lost: its age in µs, else '';
--         whose reservations it is counted with, and how many these may be
-- The latter is restored also where there is no room now. It lives on for a moment, so that
-- the commit that is sent again after it finds it. '1' at the end says that it was lost.
-- A spent budget is no back-off here: the room itself decides. Blocks and operators'
-- are kept, and the first reservation after them is the probe.
local RESTORED_FOR = 10 * SECOND
local id, count, age = ARGV[7], number(ARGV[10]), ARGV[15] and ARGV[15] ~= '' and number(ARGV[15])
expire_reservations()
local reservation = load(reservation_key(id))
if reservation.fingerprint and reservation.fingerprint ~= ARGV[8] then return reply('RESERVATION_ID_REUSED') end
if reservation.state then return reply('OK', reservation.state, reservation.expires_us) end

local place, quiet, caller = cjson.decode(ARGV[14]), {}, 'reservation:' .. id
for _, one in ipairs(subject_to(ARGV[13], {place})) do
  if one.cause ~= 'SPENT' then quiet[#quiet + 1] = one end
end
local wait = not age and wait_of(caller, quiet, false)
-- Reservations have no turns: a token whose probe erred lets others go first for a moment.
for _, one in ipairs(wait == nil and quiet or {}) do
  local start = number(one.probe_dropped_us) + LIVE_FOR
  if one.state == 'PROBING' and one.went_in_vain == ARGV[13] and now < start then
    wait = {start = start, back_off = one}
  end
end
if wait then return reply('BACKING_OFF', us(wait.start), shown_back_off(wait.back_off)) end

local account = ARGV[16] and account_key(ARGV[16])
if account then
  redis.call('ZREMRANGEBYSCORE', account, '-inf', us(sure))
  if redis.call('ZCARD', account) >= number(ARGV[17]) then return reply('TOO_MANY_RESERVATIONS') end
end
local specs, budgets, spent = cjson.decode(ARGV[11]), {}, {}
if not may_count(ARGV[13]) then return reply('TOO_MANY_EVENTS') end
for i, spec in ipairs(specs) do
  spec = counted_in(spec)
  specs[i] = spec
  budgets[i] = load_budget(spec.id, spec)
  if not age and count > room(budgets[i]) then spent[#spent + 1] = shown_budget(spec.id, budgets[i], count) end
end
if #spent > 0 then return reply('BUDGET_SPENT', spent) end
local known_at = not age and clock_in_doubt and now + SECOND or 0
for _, spec in ipairs(not age and specs or {}) do known_at = math.max(known_at, counts_known_at(spec.window_us)) end
if known_at > 0 then return reply('COUNTS_UNKNOWN', us(over_at(known_at))) end

local ttl, longest = number(ARGV[9]), 0
local reserved = now - (age or 0)
local expires = age and math.max(reserved + ttl, now + RESTORED_FOR) or now + ttl
for i, spec in ipairs(specs) do
  save(spec.id, budgets[i], {reserved = number(budgets[i].reserved) + count})
  redis.call('ZADD', reserved_key(spec.id), us(expires), held(id, count))
  use_budget(spec.id, expires + spec.grain_us + spec.window_us + 1, spec.by, spec.coarse)
  longest = math.max(longest, spec.window_us)
end
put(reservation_key(id), reservation, {
  fingerprint = ARGV[8], caller = ARGV[12], state = 'reserved', count = count, budgets = cjson.encode(specs),
  reserved_us = reserved, expires_us = expires, token = ARGV[13], place = ARGV[14],
  account = ARGV[16] or '',
})
if not age then go(caller, quiet) end
redis.call('ZADD', RESERVATIONS, us(expires), id)
if account then
  redis.call('ZADD', account, us(expires), id)
  keep(account, expires - now + CLOCK_SLACK)
end
for _, key in ipairs({reservation_key(id), RESERVATIONS}) do keep(key, expires - now + longest + OLDEST_US) end
keep_id(ARGV[13], expires - now + longest + OLDEST_US)
return reply('OK', 'reserved', us(expires), age and '1' or '')
