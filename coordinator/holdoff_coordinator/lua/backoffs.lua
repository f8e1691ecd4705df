-- Stands between common.lua and leases.lua: who must be quiet, and who goes first
-- afterwards.
--
-- A back-off is a pause on a scope: a set of values of token, division and
-- endpoint, where '' means any. It is QUIET until an instant that can move; then
-- PROBING until one caller, who goes first, succeeded; then REOPENING, while the
-- others follow, a step apart, in the order in which they came. A spent budget of
-- calls is arithmetic: that one is over when there is room.
--
-- Callers are requests for a lease, by their hash, and reservations.

local SHARE = 2 -- a token may use so many times what is free in its app
local PROBE_FOR = 60 * SECOND -- a probe that went on so long without an error succeeded
local STEP_MOST, STEP_LEAST, SPREAD = SECOND / 5, SECOND * 0.06, 5 * SECOND
local FORGET_US = 24 * 3600 * SECOND -- a back-off that nobody probed is over then
local SILENT_FOR = 60 * SECOND -- who did not ask for so long follows nobody
local TOUCHED_US = 7 * 24 * 3600 * SECOND
local MOVES_KEPT = 20000 -- more than an app has budgets and back-offs

local BACK_OFFS = SHARD .. ':backoffs' -- ids of those that are not over, by their end
local MOVED = SHARD .. ':moved' -- what changed, by the number of its latest change

local function back_off_key(id) return SHARD .. ':backoff:' .. id end
local function turns_key(id) return SHARD .. ':turns:' .. id end -- callers, in order
-- Callers by when they asked; negative while another back-off holds them, too.
local function callers_key(id) return SHARD .. ':callers:' .. id end
-- Places of a week, of a job or a lease of a token.
local function touched_key(token, who) return SHARD .. ':touched:' .. token .. ':' .. who end
local function reservation_key(id) return SHARD .. ':reservation:' .. id end

-- Lets a key live so much longer at least: what another script needs it for stays.
local function keep(key, span_us)
  local ms = math.ceil(span_us / 1000)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, us(ms)) end
end

-- Tells those who watch budgets that one, or a back-off, is not what it was.
local function moved(what)
  redis.call('ZADD', MOVED, us(redis.call('HINCRBY', SHARD, 'moves', 1)), what)
  redis.call('ZREMRANGEBYRANK', MOVED, 0, -MOVES_KEPT - 1)
  keep(MOVED, 2 * FORGET_US)
end

local announced = false

-- Makes replicas ask for all who hold or wait: what they may do has changed. Once is enough.
local function announce()
  if not announced then redis.call('SPUBLISH', SHARD .. ':wake', '*') end
  announced = true
end

local function back_off_changed(one, changes)
  put(back_off_key(one.id), one, changes)
  redis.call('HINCRBY', SHARD, 'back_off_moves', 1)
  moved('back-off ' .. one.id)
  announce()
end

-- Whether a caller that was silent for so long is live; the clock may have gone back since.
local function is_live(silent) return silent <= LIVE_FOR and silent >= -SECOND end

local found -- the back-offs of this app, by id, once somebody asked
local by_scope -- the same by scope, in lists

local function end_back_off(one)
  redis.call('ZREM', BACK_OFFS, one.id)
  redis.call('DEL', turns_key(one.id), callers_key(one.id))
  redis.call('HDEL', back_off_key(one.id), 'probe', 'went_first', 'reopened_us')
  back_off_changed(one, {state = 'OVER', ended_us = now})
  found[one.id] = nil
end

-- Lets those who kept a back-off follow, a step apart; its probe goes on.
local function reopen(one)
  if one.state == 'REOPENING' then return end
  local probe, turns, old = one.probe, turns_key(one.id), now - SILENT_FOR
  if probe then redis.call('ZREM', turns, probe) end
  redis.call('HDEL', back_off_key(one.id), 'probe')
  one.probe = nil
  for _, silent in ipairs(redis.call('ZRANGEBYSCORE', callers_key(one.id), '(' .. us(-old), '(' .. us(old))) do
    redis.call('ZREM', turns, silent)
  end
  local callers = redis.call('ZCARD', turns)
  if callers == 0 then return end_back_off(one) end
  local step = math.floor(math.max(STEP_LEAST, math.min(STEP_MOST, SPREAD / callers)))
  back_off_changed(one, {state = 'REOPENING', reopened_us = now, step_us = step, went_first = probe})
end

-- Gives up the place of a caller that is gone, or that went first in vain: if it asks again
-- it comes after all others.
local function give_up_turn(caller)
  for _, one in pairs(found) do
    if one.state ~= 'REOPENING' then redis.call('ZREM', turns_key(one.id), caller) end
  end
end

-- The token for which a caller asks.
local function token_of(caller)
  local reservation = caller:match('^reservation:(.*)')
  return redis.call('HGET', reservation and reservation_key(reservation) or request_key(caller), 'token')
end

-- Whether an error was met since the probe began.
local function probe_erred(one) return number(one.erred_us) >= number(one.probe_us) end

local function drop_probe(one)
  redis.call('HDEL', back_off_key(one.id), 'probe')
  give_up_turn(one.probe)
  local token = one.token == '' and probe_erred(one) and token_of(one.probe)
  back_off_changed(one, {probe_dropped_us = now, went_in_vain = token or ''})
  one.probe = nil
end

local function probe_lives(one)
  local reservation = one.probe:match('^reservation:(.*)')
  local state, expires
  if reservation then
    state, expires = unpack(redis.call('HMGET', reservation_key(reservation), 'state', 'expires_us'))
    return state == 'reserved' and number(expires) > sure
  end
  local id, lease = unpack(redis.call('HMGET', request_key(one.probe), 'token', 'lease'))
  if not lease then return false end
  state, expires = unpack(redis.call('HMGET', lease_key(id, lease), 'state', 'expires_us'))
  return (state == 'ACTIVE' or state == 'OFFERED') and number(expires) > sure
end

-- Brings a back-off up to this instant.
local function settle_back_off(one)
  local by = moved_by(one)
  if by > 0 then
    put(back_off_key(one.id), one, {until_us = number(one.until_us) + by, gained_us = shard.gained_us})
  end
  for _, field in ipairs({'since_us', 'reopened_us', 'probe_us', 'erred_us', 'probe_dropped_us'}) do
    local ahead = number(one[field]) - now
    if ahead > 0 then -- the clock of the store went back since
      put(back_off_key(one.id), one, {[field] = now})
      if field == 'since_us' then put(back_off_key(one.id), one, {until_us = number(one.until_us) - ahead}) end
    end
  end
  if sure < number(one.until_us) then return end
  if one.probes ~= '1' then return end_back_off(one) end
  if one.state == 'QUIET' then back_off_changed(one, {state = 'PROBING'}) end
  if one.state == 'PROBING' then
    if one.probe and not probe_lives(one) then drop_probe(one) end
    if one.probe then
      local clean_since = math.max(number(one.probe_us), number(one.erred_us))
      if now - clean_since >= PROBE_FOR then
        reopen(one)
      elseif now - number(one.probe_us) >= 3 * PROBE_FOR then
        drop_probe(one) -- it keeps causing errors: the next one may succeed
      end
    elseif now - number(one.until_us) > FORGET_US then
      end_back_off(one)
    end
  end
  if one.state == 'REOPENING' then
    local steps = redis.call('ZCARD', turns_key(one.id)) + 1
    if now >= number(one.reopened_us) + steps * number(one.step_us) then end_back_off(one) end
  end
end

-- The back-offs of this app that are not over.
local function back_offs()
  if found then return found end
  found = {}
  local ids = redis.call('ZRANGE', BACK_OFFS, 0, -1)
  local function load_one(id)
    local one = load(back_off_key(id))
    one.id = id
    for _, key in ipairs({turns_key(id), callers_key(id)}) do redis.call('ZCARD', key) end -- else it is damaged
    if one.until_us then found[id] = one else redis.call('ZREM', BACK_OFFS, id) end
    return true
  end
  local function settle_one(id)
    if found[id] then settle_back_off(found[id]) end
    return true
  end
  for _, act in ipairs({load_one, settle_one}) do
    for _, id in ipairs(ids) do
      if not spare('backOffs/' .. id, act, id) then found[id] = nil end
    end
  end
  return found
end

-- The record of a back-off, also of one that is over.
local function back_off_record(id)
  local one = back_offs()[id] or load(back_off_key(id))
  one.id = id
  return one
end

-- Remembers a back-off for as long as it may matter.
local function keep_back_off(one)
  local kept = number(one.until_us) - now + 2 * math.max(FORGET_US, number(one.forget_us))
  for _, key in ipairs({BACK_OFFS, back_off_key(one.id)}) do keep(key, kept) end
end

local spelling

do -- its own locals: Lua allows 200 in all
  local SPELLINGS_MOST = 1000 -- of a token; then all of them are forgotten

  local function known(key, endpoint, spelled)
    local first = redis.call('HGET', key, endpoint)
    if not first and spelled then
      if redis.call('HLEN', key) >= SPELLINGS_MOST then redis.call('DEL', key) end
      redis.call('HSET', key, endpoint, spelled)
    end
    keep(key, TOUCHED_US + SECOND)
    return first
  end

  -- How people see an endpoint, which is compared without case: as it was spelled first in a scope of
  -- this token, or in one that tokens share, while that is remembered. `spelled` is how it is now.
  function spelling(token, endpoint, spelled)
    if endpoint == '' then return '' end
    return spare('spellings/' .. token, known, SHARD .. ':spellings:' .. token, endpoint, spelled) or spelled
  end
end

local function audit_back_off(kind, one, facts)
  audit(kind, '/backOffs/' .. one.id, {
    cause = one.cause, limit = one.limit, status = one.status, reason = facts.reason,
    token = one.token, division = one.division, endpoint = one.spelled or one.endpoint,
    user = facts.user, host = facts.host, job = facts.job,
  }, true)
end

-- Whether a token that has `mine` of at most `most` things of its app may have another one: up to a
-- multiple of what is free. So whatever one token does, there is room for others.
local function in_share(mine, all, most, share) return mine < share * (most - all) end

local be_quiet

do -- its own locals: Lua allows 200 in all
  local BACK_OFFS_MOST = 1000 -- of an app; beyond a token's share of them, the whole token backs off

  local function may_back_off(by)
    local mine, all = 0, 0
    for _, one in pairs(back_offs()) do
      all = all + 1
      if (one.from or one.token) == by then mine = mine + 1 end
    end
    return in_share(mine, all, BACK_OFFS_MOST, SHARE)
  end

  -- Makes a scope quiet until an instant. `facts` has token, division, endpoint, cause, `from` (the
  -- token whose job caused it), and more for people.
  function be_quiet(id, facts)
    local by = facts.from or facts.token
    if not redis.call('ZSCORE', BACK_OFFS, id) and not may_back_off(by) then
      id, facts.token, facts.division, facts.endpoint, facts.spelled = 'many-' .. redis.sha1hex(by), by, '', '', ''
      facts.reason = 'too many scopes back off'
      facts.until_us = math.max(facts.until_us, number(redis.call('HGET', back_off_key(id), 'until_us')))
    end
    local one = back_off_record(id)
    if one.state == 'QUIET' and us(facts.until_us) == one.until_us then return end
    if one.probe then give_up_turn(one.probe) end
    for _, field in ipairs({'probe', 'went_first', 'went_in_vain', 'reopened_us', 'erred_us', 'cleared_by', 'clear_reason'}) do
      redis.call('HDEL', back_off_key(id), field)
      one[field] = nil
    end
    local began = one.state ~= 'QUIET' or facts.cause == 'OPERATOR'
    facts.state, facts.gained_us = 'QUIET', shard.gained_us or '0'
    if not found[id] then by_scope = nil end
    found[id] = one
    redis.call('ZADD', BACK_OFFS, us(facts.until_us), id)
    back_off_changed(one, facts)
    keep_back_off(one)
    if began then audit_back_off('BACK_OFF_BEGAN', one, facts) end
  end
end

-- Callers -------------------------------------------------------------------

-- Returns the table that another one has under a key, made if need be.
local function within(tables, key)
  tables[key] = tables[key] or {}
  return tables[key]
end

-- The back-offs that calls of a token at these places, {division, endpoint} each, are
-- subject to: those whose pairs they contain.
local function subject_to(token, places)
  if not next(back_offs()) then return {} end
  if not by_scope then
    by_scope = {}
    for _, one in pairs(found) do
      table.insert(within(within(within(by_scope, one.token), one.division), one.endpoint), one)
    end
  end
  local list, seen = {}, {}
  local function add(some)
    for _, one in ipairs(some or {}) do
      if found[one.id] and not seen[one.id] then
        seen[one.id] = true
        list[#list + 1] = one
      end
    end
  end
  -- Without joining texts: a queue may have thousands of places.
  local function match(by_division, division, endpoint)
    local by_endpoint = by_division[division]
    if by_endpoint then
      add(by_endpoint[''])
      if endpoint ~= '' then add(by_endpoint[endpoint]) end
    end
  end
  for _, by_division in pairs({by_scope[''] or false, token ~= '' and by_scope[token] or false}) do
    for _, place in ipairs(by_division and places or {}) do
      match(by_division, '', place[2])
      if place[1] ~= '' then match(by_division, place[1], place[2]) end
    end
  end
  table.sort(list, function(one, other) return one.id < other.id end)
  return list
end

-- Where a job, or the holder of a lease, of a token erred within a week.
local function touched(token, who)
  local function read()
    local places = redis.call('ZRANGEBYSCORE', touched_key(token, who), us(now - TOUCHED_US), '+inf')
    for i, place in ipairs(places) do places[i] = cjson.decode(place) end
    return places
  end
  return spare('touched/' .. token .. ':' .. who, read) or {}
end

local places_of

do -- its own locals: Lua allows 200 in all
  local erred = {} -- by token and job: where it erred, by the part of the place that is given

  -- Where a job of a token erred within a week, at places that a less specific place includes.
  local function erred_within(token, job, place)
    local of_job = within(within(erred, token), job)
    if not of_job[''] then
      of_job[''] = {}
      for _, one in ipairs(touched(token, job)) do
        for _, key in ipairs({'', '1' .. one[1], '2' .. one[2]}) do table.insert(within(of_job, key), one) end
      end
    end
    local key = place[1] ~= '' and '1' .. place[1] or place[2] ~= '' and '2' .. place[2] or ''
    return of_job[key] or {}
  end

  -- The places of a job's calls: those it declared, and for what it left open those
  -- where jobs of its name erred within a week, with the same token.
  function places_of(token, declared, job)
    local places = {{'', ''}}
    if not next(back_offs()) then return places end
    for _, place in ipairs(declared and declared ~= '' and cjson.decode(declared) or {{'', ''}}) do
      places[#places + 1] = place
      if job and job ~= '' and (place[1] == '' or place[2] == '') then
        for _, one in ipairs(erred_within(token, job, place)) do places[#places + 1] = one end
      end
    end
    return places
  end
end

-- Whether nobody came before a caller who still asks, and whom nothing else holds.
local function is_next(one, caller)
  for _, other in ipairs(redis.call('ZRANGE', turns_key(one.id), 0, -1)) do
    if other == caller then return true end
    if is_live(now - number(redis.call('ZSCORE', callers_key(one.id), other) or nil)) then return false end
  end
  return true
end

-- Gives a caller its place among those who follow. It has the same number in all
-- back-offs that are not reopening, so that no two callers wait for each other.
local function take_turn(caller, subject)
  local turn
  for _, one in ipairs(subject) do
    local its = one.state ~= 'REOPENING' and tonumber(redis.call('ZSCORE', turns_key(one.id), caller) or nil)
    if its then turn = math.min(turn or its, its) end
  end
  for _, one in ipairs(subject) do
    if one.probes == '1' and one.probe ~= caller and one.went_first ~= caller then
      if not redis.call('ZSCORE', turns_key(one.id), caller) then
        local new = one.state ~= 'REOPENING' and turn or redis.call('HINCRBY', SHARD, 'sequence', 1)
        if one.state ~= 'REOPENING' then turn = new end
        redis.call('ZADD', turns_key(one.id), us(new), caller)
      end
    end
  end
end

-- Whether one who waits stands in the way of those who come after it at a back-off: no
-- other back-off holds it.
local function in_the_way(wait, one)
  return not wait or wait.holders == 0 or (wait.holders == 1 and wait.holder == one)
end

-- What a caller who is subject to these back-offs waits for: {start, back-off, timed if
-- it may go at the start without being told}, and how many hold it, whoever comes before
-- it; nil if it may go now. Where `asks` is not false it has a place among those who
-- follow later.
local function wait_of(caller, subject, asks)
  if asks then take_turn(caller, subject) end
  local wait
  local function waits(start, one, timed, holds)
    wait = wait or {holders = 0}
    if holds then wait.holders, wait.holder = wait.holders + 1, one end
    if not wait.start or start > wait.start then wait.start, wait.back_off, wait.timed = start, one, timed end
  end
  for _, one in ipairs(subject) do
    if one.state == 'QUIET' then
      waits(over_at(number(one.until_us)), one, true, true)
    elseif one.state == 'PROBING' and one.probe ~= caller then
      if one.probe or not is_next(one, caller) then waits(now, one, false, one.probe) end
    elseif one.state == 'REOPENING' and one.went_first ~= caller then
      local rank = redis.call('ZRANK', turns_key(one.id), caller) or redis.call('ZCARD', turns_key(one.id))
      local start = number(one.reopened_us) + (rank + 1) * number(one.step_us)
      if now < start then waits(start, one, true, true) end
    end
  end
  for _, one in ipairs(asks and subject or {}) do
    if one.probes == '1' and one.probe ~= caller and one.went_first ~= caller then
      redis.call('ZADD', callers_key(one.id), us(in_the_way(wait, one) and now or -now), caller)
      for _, key in ipairs({turns_key(one.id), callers_key(one.id)}) do
        keep(key, math.max(0, number(one.until_us) - now) + FORGET_US)
      end
    end
  end
  return wait
end

-- Lets a caller go: it is the probe of every back-off that has none.
local function go(caller, subject)
  for _, one in ipairs(subject) do
    if one.state == 'PROBING' and not one.probe then
      back_off_changed(one, {probe = caller, probe_us = now})
    end
  end
end

-- A caller has ended: it probes no more, and waits for no turn.
local function caller_ended(caller, well)
  for _, one in pairs(back_offs()) do
    if one.probe == caller then
      if well and not probe_erred(one) then reopen(one) else drop_probe(one) end
    end
  end
  give_up_turn(caller)
end

-- An error counts against the probes of its own token at its place.
local function probes_err(token, place, at)
  for _, one in ipairs(subject_to(token, {place})) do
    if one.probe and at >= number(one.probe_us) and token_of(one.probe) == token then
      put(back_off_key(one.id), one, {erred_us = math.max(number(one.erred_us), at)})
    end
  end
end

local function flat(record)
  local list = {}
  for field, value in pairs(record) do
    list[#list + 1] = field
    list[#list + 1] = value
  end
  return list
end

-- A back-off for people: its record, and of a probe that is a lease the holder and the token.
local function shown_back_off(one)
  local shown = flat(one)
  if one.probe and not one.probe:find(':') then
    local holder, token = unpack(redis.call('HMGET', request_key(one.probe), 'holder', 'token'))
    for _, value in ipairs({'probe_holder', holder or '', 'probe_token', token or ''}) do
      shown[#shown + 1] = value
    end
  end
  return shown
end
