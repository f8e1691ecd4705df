-- Stands between leases.lua and the scripts about budgets: what was counted, what is
-- reserved, how much room is left, and what follows for the scope.
--
-- A budget is given as {id, limit, kind, most, margin, window_us, grain_us,
-- statuses, token, division, endpoint, spelled, by, coarser}, which the coordinator
-- works out from the policy. `by` is the token whose event it is. `coarser` are the
-- scopes, each {id, token, division, endpoint}, in which it counts instead if that
-- token has opened too many; the last of them is the whole token. The events of a
-- budget are kept in a log of at most the window's length. A log that is exact has
-- an entry an event; where the limit is large (grain_us above 0), or once it has
-- LOG_MOST entries, events share the entry of a slice of time and count as if they
-- happened at its end: never too few, and none longer than the window and one slice.

local LOG_MOST = 2000 -- entries of their own a budget
local OLDEST_US = 24 * 3600 * SECOND -- a report may be this old
local RESERVED_MOST = 3600 * SECOND -- also in budgets.py

local BUDGETS = SHARD .. ':budgets' -- ids, by when nothing is left in the window
local COARSE = SHARD .. ':coarse' -- the same, for those that count for narrower ones
local IDS = SHARD .. ':events' -- ids that were counted, by how long they are kept
local RESERVATIONS = SHARD .. ':reservations' -- ids, by when they expire

local function budget_key(id) return SHARD .. ':budget:' .. id end
local function log_key(id) return SHARD .. ':log:' .. id end
local function weights_key(id) return SHARD .. ':weights:' .. id end
local function account_key(account) return RESERVATIONS .. ':' .. account end -- those of one caller
local function reserved_key(id) return SHARD .. ':reserved:' .. id end -- `held`, by expiry
local function scopes_key(who) return SHARD .. ':scopes:' .. who end -- as BUDGETS, of one token or caller
-- Who uses the shares of an app, besides the token: the caller, unless it has no name.
local CALLER = ARGV[5] ~= '' and ARGV[5] ~= 'anonymous' and '@' .. redis.sha1hex(ARGV[5]) or nil

-- Lets a budget live so much longer at least. Its keys go together: a sum must
-- not outlive what it is the sum of.
local function keep_budget(id, span_us)
  keep(budget_key(id), span_us)
  local whole_us = redis.call('PTTL', budget_key(id)) * 1000
  for _, key in ipairs({log_key(id), weights_key(id), reserved_key(id)}) do keep(key, whole_us) end
end

-- Notes the first instant at which nothing of a budget is left.
local function use_budget(id, until_us, by, coarse)
  for key, wanted in pairs({
    [BUDGETS] = true, [COARSE] = coarse, [scopes_key(by or '')] = by, [scopes_key(CALLER or '@')] = by and CALLER,
  }) do
    if wanted then
      redis.call('ZADD', key, 'GT', us(until_us), id)
      keep(key, until_us - now + CLOCK_SLACK)
    end
  end
  keep_budget(id, until_us - now + CLOCK_SLACK)
end

-- Takes out of a budget what has left its window.
local function leave(id, budget)
  local by = moved_by(budget)
  local entries = by > 0 and redis.call('ZRANGE', log_key(id), 0, -1) or {}
  for _, entry in ipairs(entries) do redis.call('ZINCRBY', log_key(id), us(by), entry) end
  if #entries > 0 then
    put(budget_key(id), budget, {gained_us = shard.gained_us})
    use_budget(id, now + number(budget.window_us) + number(budget.grain_us), nil, budget.coarse)
  end
  local latest = now + math.max(number(budget.grain_us), SECOND)
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', log_key(id), '(' .. us(latest), '+inf')) do
    redis.call('ZADD', log_key(id), us(latest), entry) -- the clock of the store went back since
  end
  local before = '(' .. us(sure - number(budget.window_us))
  local gone = redis.call('ZRANGEBYSCORE', log_key(id), '-inf', before)
  if #gone == 0 then return end
  local used = number(budget.used)
  for _, entry in ipairs(gone) do
    used = used - number(redis.call('HGET', weights_key(id), entry) or '1')
    redis.call('HDEL', weights_key(id), entry)
  end
  redis.call('ZREMRANGEBYSCORE', log_key(id), '-inf', before)
  put(budget_key(id), budget, {used = used})
end

local SPEC = {'limit', 'kind', 'most', 'margin', 'window_us', 'grain_us', 'token', 'division', 'endpoint'}

-- Adds a token to the first ten that use a shared scope: callers with a role on one of them may see it.
local function with_user(users, token)
  if not users or users == '' then return token end
  if (' ' .. users .. ' '):find(' ' .. token .. ' ', 1, true) then return users end
  return select(2, users:gsub(' ', ' ')) < 9 and users .. ' ' .. token or users
end

-- A budget as it is at this instant, with what the policy says now if that is given.
local function load_budget(id, spec)
  local budget = load(budget_key(id))
  for _, field in ipairs(spec and SPEC or {}) do
    budget[field] = type(spec[field]) == 'number' and us(spec[field]) or spec[field]
  end
  if spec then budget.spelled = spelling(spec.token, spec.endpoint, budget.spelled or spec.spelled) end
  if spec and spec.coarse then budget.coarse = '1' end
  if spec and spec.by and spec.token == '' then budget.users = with_user(budget.users, spec.by) end
  if budget.limit then leave(id, budget) end
  return budget
end

local function save(id, budget, changes)
  for _, field in ipairs(SPEC) do changes[field] = budget[field] end
  for _, field in ipairs({'gained_us', 'coarse', 'users', 'spelled'}) do changes[field] = budget[field] end
  put(budget_key(id), budget, changes)
  moved('budget ' .. id)
end

local function room(budget)
  return number(budget.most) - number(budget.margin) - number(budget.used) - number(budget.reserved)
end

-- The instant at which an event counts as having happened, and whether it has an
-- entry of its own.
local function stamp(id, budget, at)
  local grain = number(budget.grain_us)
  if grain == 0 and redis.call('ZCARD', log_key(id)) >= LOG_MOST then grain = SECOND end
  if grain == 0 then return at, true end
  return (math.floor(at / grain) + 1) * grain, false
end

-- When there is room for so many more, if nothing else happens: events leave, and
-- reservations become events when they expire.
local function room_at(id, budget, count)
  local missing = count - room(budget)
  if missing <= 0 then return now end
  local leaving = {}
  local entries = redis.call('ZRANGE', log_key(id), 0, -1, 'WITHSCORES')
  for i = 1, #entries, 2 do leaving[#leaving + 1] = {at = tonumber(entries[i + 1]), entry = entries[i]} end
  local held = redis.call('ZRANGE', reserved_key(id), 0, -1, 'WITHSCORES')
  for i = 1, #held, 2 do
    leaving[#leaving + 1] = {at = stamp(id, budget, tonumber(held[i + 1])), count = held[i]:match(':(%d+)$')}
  end
  table.sort(leaving, function(one, other) return one.at < other.at end)
  for _, one in ipairs(leaving) do
    missing = missing - number(one.count or redis.call('HGET', weights_key(id), one.entry) or '1')
    if missing <= 0 then return over_at(one.at + number(budget.window_us) + 1) end
  end
  return now + number(budget.window_us) -- more than the budget ever allows
end

local cause -- who caused the event that is counted now: {from, job, host, user, status}

-- Makes the scope of a budget quiet once no room is left short of the margin,
-- whatever is reserved: until so many events have left that there is room for one.
local function check_spent(id, budget)
  local allowed, until_us = number(budget.most) - number(budget.margin), now
  if number(budget.used) < allowed then return end
  local entries = redis.call('ZRANGE', log_key(id), -allowed, -1, 'WITHSCORES')
  for i = #entries - 1, 1, -2 do -- from the newest: whatever is older than the last one allowed must leave
    allowed = allowed - number(redis.call('HGET', weights_key(id), entries[i]) or '1')
    until_us = number(entries[i + 1]) + number(budget.window_us) + 1
    if allowed <= 0 then break end
  end
  local one = back_off_record(id)
  local facts = {
    token = budget.token, division = budget.division, endpoint = budget.endpoint, spelled = budget.spelled,
    cause = 'SPENT', kind = budget.kind, limit = budget.limit, users = budget.users,
    reason = budget.coarse and 'too many scopes to count each' or '',
    since_us = one.state == 'QUIET' and number(one.since_us) or now, until_us = until_us,
    -- Of calls and token requests it is known when there is room: nobody has to try.
    probes = budget.kind == 'ERROR' and '1' or '',
  }
  for field, value in pairs(cause or {}) do facts[field] = value end
  be_quiet(id, facts)
end

-- Returns the entry that has the event, or nil if it left the window before.
local function log_event(spec, event, at, count)
  local id = spec.id
  if at < sure - spec.window_us then return end
  local budget = load_budget(id, spec)
  local stamped, own = stamp(id, budget, at)
  local entry = own and event or 'until:' .. us(stamped)
  if not own then
    redis.call('HINCRBY', weights_key(id), entry, us(count))
  elseif count ~= 1 then
    redis.call('HSET', weights_key(id), entry, us(count))
  end
  redis.call('ZADD', log_key(id), us(stamped), entry)
  save(id, budget, {used = number(budget.used) + count, last_us = math.max(number(budget.last_us), at)})
  use_budget(id, stamped + spec.window_us + 1, spec.by, spec.coarse)
  check_spent(id, budget)
  return entry
end

-- Moves an event to a later time, from the entry that had it; one that was reset
-- since it was counted stays away.
local function move_event(spec, event, entry, counted, to, count)
  local id, budget = spec.id, load_budget(spec.id)
  if number(budget.reset_us) >= counted then return end
  if entry and redis.call('ZSCORE', log_key(id), entry) then
    local others = number(redis.call('HGET', weights_key(id), entry) or '1') - count
    if others > 0 then
      redis.call('HSET', weights_key(id), entry, us(others))
    else
      redis.call('ZREM', log_key(id), entry)
      redis.call('HDEL', weights_key(id), entry)
    end
    put(budget_key(id), budget, {used = number(budget.used) - count})
  end
  log_event(spec, event, to, count)
end

local counted_in

do -- its own locals: Lua allows 200 in all
  local BUDGETS_MOST = 10000 -- of an app: scopes with an event in their window, except whole tokens

  local function size(key)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', us(sure))
    return redis.call('ZCARD', key)
  end

  -- The budget in which an event of `spec` counts: its own, or a coarser one if its token or the caller
  -- has opened too many, or already uses a coarser one. So all events in the window of a scope are in one
  -- budget: while a coarser one is in use, no narrower one is opened.
  function counted_in(spec)
    local all = size(BUDGETS)
    if not (spec.coarser and spec.coarser[1]) or redis.call('ZSCORE', BUDGETS, spec.id) then return spec end
    local wanted
    size(COARSE)
    for _, one in ipairs(spec.coarser) do
      if not wanted and redis.call('ZSCORE', COARSE, one.id) then wanted = one end
    end
    if not wanted then
      local mine = math.max(size(scopes_key(spec.by)), CALLER and size(scopes_key(CALLER)) or 0)
      if in_share(mine, all, BUDGETS_MOST, SHARE) then return spec end
      for i, one in ipairs(spec.coarser) do
        local fits = i == #spec.coarser or in_share(mine, all, BUDGETS_MOST, 2 * SHARE)
        if not wanted and fits then wanted = one end
      end
    end
    local coarse = {coarse = '1'}
    for _, fields in ipairs({spec, wanted}) do
      for field, value in pairs(fields) do coarse[field] = value end
    end
    coarse.coarser = nil
    return coarse
  end
end

local may_count, keep_id

do -- its own locals: Lua allows 200 in all
  local IDS_MOST = 500000 -- of an app, some 50 MB
  local IDS_SLICE = 3 * 3600 * SECOND -- precision of the time until which they are kept

  local kept_ids = {} -- how many ids of each token and caller are kept

  local function ids_of(who)
    local key = SHARD .. ':ids:' .. who
    if not kept_ids[who] then
      local sum = 0
      for slice, count in pairs(load(key)) do
        if number(slice) > sure then sum = sum + number(count) else redis.call('HDEL', key, slice) end
      end
      kept_ids[who] = sum
    end
    return kept_ids[who], key
  end

  -- Whether the app has room for another event of a token, from this caller.
  function may_count(token)
    local all = redis.call('ZCARD', IDS) + redis.call('ZCARD', RESERVATIONS)
    local function has_room(who) return in_share(ids_of(who), all, IDS_MOST, 2 * SHARE) end
    return has_room(token) and (not CALLER or has_room(CALLER))
  end

  -- Notes that an id of a token, from this caller, is kept for so long.
  function keep_id(token, kept)
    for _, who in ipairs({token, CALLER}) do
      local sum, key = ids_of(who)
      redis.call('HINCRBY', key, us((math.floor((now + kept) / IDS_SLICE) + 1) * IDS_SLICE), 1)
      keep(key, kept + 2 * IDS_SLICE)
      kept_ids[who] = sum + 1
    end
  end
end

-- Counts an event in its budgets, once, however many there are. Returns the
-- entries that have it, by budget; nil if it was counted before. The id of a
-- reservation was noted with it: then there is no token.
local function count_once(event, at, count, specs, token)
  if redis.call('ZSCORE', IDS, event) then return end
  local kept, entries = OLDEST_US, {}
  for _, spec in ipairs(specs) do
    entries[spec.id] = spare('budgets/' .. spec.id, log_event, spec, event, at, count)
    kept = math.max(kept, OLDEST_US + spec.window_us)
  end
  redis.call('ZADD', IDS, us(now + kept), event)
  keep(IDS, kept)
  if token then keep_id(token, kept) end
  return entries
end

-- Counts a reported event if its token has room for it. Returns the outcome.
local function count_event(event, at, count, specs, token)
  if redis.call('ZSCORE', IDS, event) then return 'KNOWN' end
  if not may_count(token) then return 'TOO_MANY_EVENTS' end
  for i, spec in ipairs(specs) do specs[i] = counted_in(spec) end
  count_once(event, at, count, specs, token)
  return 'COUNTED'
end

local function held(reservation, count) return reservation .. ':' .. us(count) end

local function release_room(reservation, specs, count)
  local function release(id)
    local budget = load_budget(id)
    if redis.call('ZREM', reserved_key(id), held(reservation, count)) == 1 then
      put(budget_key(id), budget, {reserved = number(budget.reserved) - count})
      moved('budget ' .. id)
    end
  end
  for _, spec in ipairs(specs) do spare('budgets/' .. spec.id, release, spec.id) end
end

-- A reservation that was not committed in time is taken to have happened, at
-- the last moment it could. Of many some at a time: the others keep their room until then.
local function expire_reservations()
  redis.call('ZREMRANGEBYSCORE', IDS, '-inf', us(sure))
  local function expire(id)
    local reservation = load(reservation_key(id))
    local ahead = number(reservation.reserved_us) - now
    if ahead > 0 then -- the clock of the store went back since
      local expires = number(reservation.expires_us) - ahead
      put(reservation_key(id), reservation, {reserved_us = now, expires_us = expires})
      redis.call('ZADD', RESERVATIONS, us(expires), id)
      return
    end
    redis.call('ZREM', RESERVATIONS, id)
    if reservation.state == 'reserved' then
      local specs, count = cjson.decode(reservation.budgets), number(reservation.count)
      local expired = number(reservation.expires_us)
      cause = {from = reservation.token}
      release_room(id, specs, count)
      put(reservation_key(id), reservation, {
        state = 'expired', at_us = expired, counted_us = now,
        entries = cjson.encode(count_once(id, expired, count, specs) or {}),
      })
    end
  end
  for _, due in ipairs({{'-inf', us(sure)}, {'(' .. us(now + RESERVED_MOST), '+inf'}}) do
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', RESERVATIONS, due[1], due[2], 'LIMIT', 0, 100)) do
      spare('reservations/' .. id, expire, id)
    end
  end
end

-- Remembers for a week where a job, or the holder of a lease, of a token erred.
local function touch(token, who, place)
  local TOUCHED_MOST = 200 -- places a job
  local TOUCHERS_MOST = 500 -- jobs and leases a token; the oldest are forgotten
  local key = touched_key(token, who)
  redis.call('ZADD', key, us(now), cjson.encode(place))
  redis.call('ZREMRANGEBYSCORE', key, '-inf', '(' .. us(now - TOUCHED_US))
  redis.call('ZREMRANGEBYRANK', key, 0, -TOUCHED_MOST - 1)
  keep(key, TOUCHED_US + SECOND)
  local touchers = SHARD .. ':touchers:' .. token
  redis.call('ZADD', touchers, us(now), who)
  keep(touchers, TOUCHED_US + SECOND)
  while redis.call('ZCARD', touchers) > TOUCHERS_MOST do
    redis.call('DEL', touched_key(token, redis.call('ZPOPMIN', touchers)[1]))
  end
end

local block

do -- its own locals: Lua allows 200 in all
  local UNCONFIRMED = 300 * SECOND -- also in docs/operating.md

  -- The provider blocks or throttles a scope. A report during a block, or about a call that was sent
  -- before it ended, prolongs it at most to the instant that it names; a report after it begins
  -- another, longer one. `claim` is the token that alone reports a block of a scope that tokens
  -- share: it stops the others for UNCONFIRMED at most, unless a report without a claim confirms it.
  local function block_scope(told, id, scope, at, claim)
    local one = back_off_record(id)
    local ended, most = number(one.until_us), claim and math.min(told.most_us, UNCONFIRMED) or told.most_us
    local sent = told.sent_age_us >= 0 and math.min(at, now - told.sent_age_us) or at
    local named = told.retry_after_us >= 0 and at + math.min(told.retry_after_us, most)
    local facts = {
      token = scope.token, division = scope.division, endpoint = scope.endpoint,
      spelled = spelling(scope.token, scope.endpoint, one.spelled or scope.spelled),
      cause = 'BLOCKED', kind = '', reason = told.reason, probes = '1', forget_us = told.forget_us,
      claim = claim or '', users = with_user(one.users, told.by),
    }
    for field, value in pairs(cause) do facts[field] = value end
    local function length(repeats) return math.floor(math.min(most, told.first_us * told.factor ^ (repeats - 1))) end
    if one.until_us and sent < ended then
      local confirms = not claim and one.claim and one.claim ~= ''
      local until_us = named or (confirms and at + length(number(one.repeats)))
      if confirms then put(back_off_key(id), one, {claim = ''}) end
      if not until_us or until_us <= ended then return end
      facts.since_us, facts.until_us, facts.repeats = number(one.since_us), until_us, number(one.repeats)
    else
      facts.repeats = one.until_us and at - ended <= told.forget_us and number(one.repeats) + 1 or 1
      facts.since_us = at
      facts.until_us = named or at + length(facts.repeats)
    end
    if facts.until_us > now then
      be_quiet(id, facts)
    else -- it is over already, and is remembered
      if not found[id] then facts.state = 'OVER' end
      put(back_off_key(id), one, facts)
      keep_back_off(one)
    end
  end

  -- Whether a lease of a token was held at an instant.
  local function was_held(token, lease_id, at)
    local lease = lease_id and load(lease_key(token, lease_id)) or {}
    return lease.accepted_us and number(lease.accepted_us) <= at and at <= number(lease.ended_us or lease.expires_us)
  end

  -- Applies a reported block: to the policy's scope, if that is the token's own, or if the reporter
  -- may report for the whole app. Otherwise to the token; and if the reporter holds a lease of the
  -- token, also to the policy's scope: once, as a claim, or in full if it confirms the claim of
  -- another token. A claim can be confirmed while its token is blocked by it.
  function block(told, at)
    if told.token ~= '' or told.for_app then return block_scope(told, told.id, told, at) end
    block_scope(told, told.own, {token = told.by, division = '', endpoint = ''}, at)
    if not was_held(told.by, told.lease, at) then return end
    local one = back_off_record(told.id)
    local claim = at - number(one.until_us) <= told.forget_us and one.claim or ''
    if claim ~= told.by then
      local confirms = claim ~= '' and at <= number(one.claim_until_us)
      block_scope(told, told.id, told, at, not confirms and told.by or nil)
    end
    one = back_off_record(told.id) -- it may not have existed before
    if one.claim == told.by then
      put(back_off_key(told.id), one, {claim_until_us = number(back_off_record(told.own).until_us)})
    end
  end
end

-- A budget for people: its record, and when there is room for so many more.
local function shown_budget(id, budget, count)
  return {id, flat(budget), us(room_at(id, budget, count))}
end
