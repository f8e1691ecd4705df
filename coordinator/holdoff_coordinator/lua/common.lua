-- Stands before every other script. Loads the shard (all keys of one app), and
-- watches the clock and the epoch.
--
-- KEYS[1]  holdoff:{app}, the shard; every other key starts with it or carries
--          the same hash tag, so that a script stays in one slot
-- ARGV[1]  what the replica makes of the store's time, in µs: its estimate, the least that the
--          clock would show had it gained nothing, what it certainly gained, and for how long
--          that matters; '' if unknown
-- ARGV[2]  the shard's epoch as the replica knows it; '' if it knows none
-- ARGV[3]  a fresh id, the epoch to give to a shard that has none
-- ARGV[4]  least length of a quarantine in µs
-- ARGV[5]  who called, and ARGV[6] from where; '' for what nobody called for
--
-- All times are µs of this server's clock; below 2^53 they are exact in Lua.

local SECOND = 1000000
local CLOCK_TOLERANCE = 1 * SECOND -- also in clock.py
local GAIN_STEP = SECOND / 50 -- a smaller gain than this is noise
local CLOCK_SLACK = 3600 * SECOND -- also in clock.py: how much longer than their contents keys live
local REPLAYED = 5 * 60 * SECOND -- replicas report again what is not older
local REPLAY_TIME = 10 * SECOND -- and take no longer for it
local LIVE_FOR = 5 * SECOND -- a waiter is live this long after it was heard
local OUTAGE_AFTER = 2 * SECOND -- replicas come by every second
local RECOVERY = 5 * SECOND -- after an outage waiters may return first
local SCHEMA = 4 -- of all records; `upgrade` below knows the older ones

local SHARD = KEYS[1]
local DUE = SHARD .. ':due'
local time = redis.call('TIME')
local now = tonumber(time[1]) * SECOND + tonumber(time[2])

local function us(number) return string.format('%.0f', number) end

local function number(text) return tonumber(text or '0') end

local function load(key)
  local flat = redis.call('HGETALL', key)
  local record = {}
  for i = 1, #flat, 2 do record[flat[i]] = flat[i + 1] end
  return record
end

local function token_key(id) return SHARD .. ':token:' .. id end
local function queue_key(id) return SHARD .. ':queue:' .. id end
local function history_key(id) return SHARD .. ':history:' .. id end
local function lock_key(id) return 'lock:' .. SHARD .. ':' .. id end
local function signal_key(id) return 'lock-signal:' .. SHARD .. ':' .. id end
local function request_key(hash) return SHARD .. ':request:' .. hash end
local function lease_key(id, lease) return SHARD .. ':lease:' .. id .. ':' .. lease end

local shard = load(SHARD)
local epoch = shard.epoch

local NAME = 'apps/' .. SHARD:match('{(.*)}')
local audited = {} -- what this call added to the trail, for the log

-- Adds an entry to a stream of ours, and returns its id. A key of another type, or a stream of
-- another life of the store, is replaced; any other error deletes nothing.
local function append(key, ...)
  local id = redis.pcall('XADD', key, ...)
  if type(id) == 'table' then
    local why = id.err
    if not (why:find('^WRONGTYPE') or why:find('equal or smaller') or why:find('stream has exhausted')) then
      error(id)
    end
    redis.call('DEL', key)
    id = redis.call('XADD', key, ...)
  end
  return id
end

-- The audit trail of an app has two streams, so that automatic events displace no operators' actions.
-- In each, one caller adds at most `most` entries for one token in a span of time; further events
-- become one entry for each kind, with a count, until the span is over.
local MACHINES = {key = SHARD .. ':audit', kept = 10000, span = 60 * SECOND, most = 30}
local OPERATORS = {key = SHARD .. ':security', kept = 10000, span = 3600 * SECOND, most = 60}
local SECURITY = {
  LEASE_BREAK_ORDERED = true, LEASE_BROKEN = true, BUDGET_RESET = true, BACK_OFF_CLEARED = true,
  TOKEN_CREATED = true, TOKEN_UPDATED = true, QUARANTINE_BEGAN = true, QUARANTINE_ENDED = true,
  GRANT_PUT = true, GRANT_DELETED = true, GRANT_TRUSTED = true,
  AUTHORIZATION_BEGAN = true, AUTHORIZATION_FAILED = true,
}

-- Adds an entry to a stream of the trail; `who` is the caller and the token. Returns its id.
local function append_audit(stream, kind, who, entry)
  local counts = stream.key .. ':' .. us(math.floor(now / stream.span))
  local number_of = redis.call('HINCRBY', counts, who, 1)
  if number_of == 1 then redis.call('PEXPIRE', counts, us(stream.span / 500)) end
  if number_of > stream.most then
    local field = kind .. ' ' .. who
    local before, count, first = (redis.call('HGET', counts, field) or ''):match('^(%S+) (%d+) (%d+)$')
    count, first = number(count) + 1, first or us(now)
    if before then redis.call('XDEL', stream.key, before) end
    for _, text in ipairs({'count', us(count), 'first_us', first}) do entry[#entry + 1] = text end
    local id = append(stream.key, 'MAXLEN', '~', stream.kept, '*', unpack(entry))
    redis.call('HSET', counts, field, id .. ' ' .. us(count) .. ' ' .. first)
    return id
  end
  return append(stream.key, 'MAXLEN', '~', stream.kept, '*', unpack(entry))
end

-- Adds to the audit trail what happened to a thing, by its name below the app. The caller is
-- named if it was its doing.
local function audit(kind, thing, facts, by_caller)
  local entry = {'kind', kind, 'resource', NAME .. thing}
  if by_caller then facts.identity, facts.peer = ARGV[5], ARGV[6] end
  for _, field in ipairs({
    'identity', 'peer', 'holder', 'job', 'host', 'user', 'reason', 'cause', 'limit', 'status',
    'token', 'division', 'endpoint', 'waited_us', 'handover_us', 'replica', 'result', 'generation',
  }) do
    if facts[field] and facts[field] ~= '' then
      entry[#entry + 1] = field
      entry[#entry + 1] = type(facts[field]) == 'number' and us(facts[field]) or facts[field]
    end
  end
  local stream = (SECURITY[kind] or facts.cause == 'OPERATOR') and OPERATORS or MACHINES
  local token = thing:match('^/tokens/([^/]*)') or facts.token or ''
  local id = append_audit(stream, kind, token .. ' ' .. (facts.identity or ''), entry)
  audited[#audited + 1] = {id, entry}
end

-- How long after its last renewal a holder's last refresh may still matter: the longest of
-- this period and of the one before.
local function longest_hold() return math.max(number(shard.hold_us), number(shard.hold_before_us)) end

local damaged = {} -- {thing, why} of the records that this call could not use

-- Does something for one thing of many and returns what that gives; nothing if the thing's
-- record is damaged, which is reported. Trouble of the whole store ends the script.
local function spare(thing, act, ...)
  local function result(well, ...)
    if well then return ... end
    local why = ...
    local text = type(why) == 'table' and why.err or tostring(why)
    local code = text:match('^(%u+) ')
    local denied = text:find('ACL failure', 1, true) or text:find('The user executing the script', 1, true)
    if denied or (code and code ~= 'WRONGTYPE' and code ~= 'ERR') then error(why) end
    damaged[#damaged + 1] = {thing, text}
  end
  return result(pcall(act, ...))
end

local function reply(status, ...)
  return {us(now), epoch or '', us(longest_hold()), {audited, damaged, shard.history or ''}, status, ...}
end

local function put(key, record, changes)
  local flat = {}
  for field, value in pairs(changes) do
    value = type(value) == 'number' and us(value) or value
    record[field] = value
    flat[#flat + 1] = field
    flat[#flat + 1] = value
  end
  redis.call('HSET', key, unpack(flat))
end

-- Decisions take something for over when it is over by both clocks: the server's, and the
-- replica's boot clock, which is never set. `lag` is how much later that is. A replica that is
-- new knows of no gain; so the others leave it in the shard.
local ESTIMATE, FLOOR, GAIN, GAIN_FOR = ARGV[1]:match('^(%d+) ?(%d*) ?(%d*) ?(%d*)$')
local gain, sure, lag

local function compare_clocks()
  gain = now < number(shard.gain_until_us) and number(shard.gain_us) or 0
  sure = math.min(now - gain, tonumber(FLOOR or '') or now)
  lag = now - sure
end
compare_clocks()

-- When something will be over that is due at an instant: then, unless it should be by now.
local function over_at(due) return due > now and due or due + lag end

local function note_gain()
  local seen = tonumber(GAIN or '') or 0
  if seen > gain + GAIN_STEP then
    put(SHARD, shard, {
      gain_us = seen, gain_until_us = now + tonumber(GAIN_FOR),
      -- What was stamped before, and may be needed for longer than that, is moved along.
      gained_us = number(shard.gained_us) + seen - gain,
    })
  end
end

-- How much later the instants of a record would be, had they been stamped after all gains.
local function moved_by(record)
  local by = number(shard.gained_us) - number(record.gained_us)
  record.gained_us = shard.gained_us or '0'
  return by
end

-- Notes for how long from now on a holder may refresh.
local function note_hold(span)
  if sure >= number(shard.hold_until_us) then
    put(SHARD, shard, {
      hold_before_us = number(shard.hold_us), hold_us = span,
      hold_until_us = now + math.max(span, number(shard.hold_us)),
    })
  elseif span > number(shard.hold_us) then
    put(SHARD, shard, {hold_us = span, hold_until_us = math.max(number(shard.hold_until_us), now + span)})
  end
end

-- `loss` is what the store may have lost: 'RESTORE' and 'DATA', anything; 'WRITES', the last ones;
-- 'EXPIRED', what it dropped too early; or 'NOTHING'. `restored_us` says from when on records may be those
-- of a backup. Several replicas report one loss: the later ones do not move it.
local function quarantine(why, loss)
  local safe = math.max(number(ARGV[4]), longest_hold())
  if sure >= number(shard.quarantine_until_us) then
    audit('QUARANTINE_BEGAN', '', {reason = why})
    put(SHARD, shard, {quarantine_since_us = now})
  end
  if now + safe > number(shard.quarantine_until_us) then
    put(SHARD, shard, {quarantine_until_us = now + safe, quarantine_for_us = safe})
  end
  put(SHARD, shard, {quarantine_reason = why})
  local restored = loss == 'RESTORE' or (loss == 'DATA' and now - number(shard.restored_us) > 2 * safe)
  if loss == 'DATA' or loss == 'RESTORE' or loss == 'EXPIRED' then put(SHARD, shard, {data_lost_us = now}) end
  if restored then put(SHARD, shard, {restored_us = now}) end
  if loss == 'WRITES' then put(SHARD, shard, {writes_lost_us = now}) end
  if loss == 'NOTHING' then put(SHARD, shard, {clock_doubted_us = now}) end
end

-- The clock went back: what was to last from then lasts from now.
local function go_back()
  put(SHARD, shard, {went_back_us = now})
  for field, span in pairs({
    quarantine_since_us = 0, quarantine_until_us = number(shard.quarantine_for_us or ARGV[4]), recovery_until_us = RECOVERY, gain_until_us = number(ARGV[4]), data_lost_us = 0, writes_lost_us = 0,
    clock_doubted_us = 0, restored_us = 0, hold_until_us = longest_hold(),
  }) do
    if number(shard[field]) > now + span then put(SHARD, shard, {[field] = now + span}) end
  end
  put(SHARD, shard, {gain_us = math.max(0, number(shard.gain_us) - (number(shard.high_water_us) - now))})
  compare_clocks()
end

-- The instant from which on all is known again that was counted in a window; 0 if it is.
local function counts_known_at(window)
  local data, writes, at = number(shard.data_lost_us), number(shard.writes_lost_us), 0
  if data > 0 then at = data + (window <= REPLAYED and math.min(window, REPLAY_TIME) or window) end
  if writes > 0 then at = math.max(at, writes + math.min(window, REPLAY_TIME)) end
  return sure < at and at or 0
end

-- Called by the only script that makes a shard.
local function ensure_epoch()
  if epoch then return end
  epoch = ARGV[3]
  redis.call('DEL', SHARD .. ':changes')
  put(SHARD, shard, {epoch = epoch, schema = SCHEMA, changes = 0, tick_us = now, service_us = 0, high_water_us = now})
  if ARGV[2] ~= '' then quarantine('the store lost the data of this app', 'DATA') end
end

-- Schema 1 did not know who waits and since when, nor whether a cooldown's end
-- was told; schema 2 knew no back-offs, so that its coordinators would not keep them.
local function upgrade_from_1()
  local function upgrade_token(id)
    local token = load(token_key(id))
    if number(token.not_before_us) > now then put(token_key(id), token, {cooling = '1'}) end
    for _, hash in ipairs(redis.call('ZRANGE', queue_key(id), 0, -1)) do
      local request = load(request_key(hash))
      if request.state then put(request_key(hash), request, {holder = '', queued_us = now}) end
    end
  end
  for _, id in ipairs(redis.call('ZRANGE', SHARD .. ':tokens', 0, -1)) do
    spare('tokens/' .. id, upgrade_token, id)
  end
  put(SHARD, shard, {changes = 0})
end

-- Schema 3 kept the longest TTL and interval that anybody ever asked for.
local function upgrade_from_3()
  local hold = number(shard.longest_ttl_us) + number(shard.longest_interval_us)
  if hold > 0 then put(SHARD, shard, {hold_us = hold, hold_until_us = now + hold}) end
  redis.call('HDEL', SHARD, 'longest_ttl_us', 'longest_interval_us')
end

local found_schema = number(shard.schema or '1')
if epoch and found_schema > SCHEMA then
  return reply('SCHEMA_TOO_NEW', us(found_schema), us(SCHEMA))
elseif epoch and found_schema < SCHEMA then
  if found_schema < 2 then upgrade_from_1() end
  upgrade_from_3()
  put(SHARD, shard, {schema = SCHEMA})
end

if epoch then
  note_gain()
  if ARGV[2] ~= '' and ARGV[2] ~= epoch then quarantine('the epoch of the store changed', 'DATA') end
  if now < number(shard.high_water_us) - CLOCK_TOLERANCE then
    go_back()
    quarantine('the clock of the store went back', 'NOTHING')
  end
  -- A replica that was promoted may lack the last writes, as may a server that began from a
  -- snapshot. Both have a history of writes that continues another one (master_replid2), though
  -- not always the one that we know: there may have been two failovers since. In a Cluster the
  -- app may also have moved to another shard, which has a history of its own and lost nothing.
  -- A managed store may refuse to tell.
  local info = redis.pcall('INFO', 'replication')
  local history = type(info) == 'string' and info:match('master_replid:(%x+)')
  if history and history ~= shard.history then
    local home = redis.pcall('CLUSTER', 'MYSHARDID')
    home = type(home) == 'string' and home or ''
    local moved = shard.home and shard.home ~= home
    if shard.history and not moved and info:find('master_replid2:%x*[1-9a-f]') then
      quarantine('another server of the store took over, and may lack the last writes', 'WRITES')
    end
    put(SHARD, shard, {history = history, home = home})
  end
  -- `service_us` is a clock that stands still while no coordinator comes by.
  local gap = now - number(shard.tick_us)
  local changes = {tick_us = now, high_water_us = now}
  if gap > OUTAGE_AFTER then
    changes.recovery_until_us = now + RECOVERY
  elseif gap > 0 then
    changes.service_us = number(shard.service_us) + gap
  end
  put(SHARD, shard, changes)
end

-- A replica whose own clock disagrees gets no grant; it then measures, and
-- declares the quarantine if the disagreement is real.
local clock_in_doubt = ESTIMATE and math.abs(now - tonumber(ESTIMATE)) > CLOCK_TOLERANCE

local function in_quarantine() return clock_in_doubt or sure < number(shard.quarantine_until_us) end

local function quarantined_until()
  return math.max(over_at(number(shard.quarantine_until_us)), clock_in_doubt and now + SECOND or 0)
end
