-- Says what became of a reservation: a call that was made, or one that was not.
-- ARGV 7.. reservation id, hash of the caller, '1' if the call was made, its age in
--         µs, its HTTP status or '0'
-- A commit after the expiry moves the events' stamp forward, once, and adds none; a
-- cancel after it changes nothing. No call was made before its room was taken.
-- Answers the reservation's state and expiry, and its record.
local id, made, status = ARGV[7], ARGV[9] == '1', ARGV[11]
expire_reservations()
local reservation = load(reservation_key(id))
if not reservation.state or reservation.caller ~= ARGV[8] then return reply('RESERVATION_NOT_FOUND') end
local specs, count = cjson.decode(reservation.budgets), number(reservation.count)
local at = math.max(now - number(ARGV[10]), number(reservation.reserved_us))

back_offs() -- while its probe is still one
cause = {from = reservation.token}

local function counts(spec)
  if spec.kind ~= 'ERROR' or status == '0' then return true end
  for _, one in ipairs(spec.statuses) do
    if us(one) == status then return true end
  end
end

if reservation.state == 'reserved' then
  redis.call('ZREM', RESERVATIONS, id)
  redis.call('ZREM', account_key(reservation.account or ''), id)
  release_room(id, specs, count)
end
if not made and reservation.state == 'reserved' then
  put(reservation_key(id), reservation, {state = 'cancelled'})
elseif made and (reservation.state == 'reserved' or reservation.state == 'cancelled') then
  local counted, erred = {}, false
  for _, spec in ipairs(specs) do
    if counts(spec) then
      counted[#counted + 1] = spec
      erred = erred or spec.kind == 'ERROR'
    end
  end
  count_once(id, at, count, counted)
  if erred then probes_err(reservation.token, cjson.decode(reservation.place), now) end
  put(reservation_key(id), reservation, {state = 'committed'})
elseif made and reservation.state == 'expired' and not reservation.late_us then
  local entries, counted = cjson.decode(reservation.entries), number(reservation.counted_us)
  if at > number(reservation.at_us) then
    for _, spec in ipairs(specs) do move_event(spec, id, entries[spec.id], counted, at, count) end
  end
  put(reservation_key(id), reservation, {late_us = now})
end
caller_ended('reservation:' .. id, reservation.state == 'committed')
return reply('OK', reservation.state, reservation.expires_us, flat(reservation))
