-- Applies what happened to users, to each in order and as a whole. Runs on Redis 6.2 and later and on Valkey.
--
-- KEYS  the name of the first user, which routes the call: in a cluster a call is of one user, whose keys are in one slot
-- ARGV  1: twelve u32: the most recent actions, follows, dislikes, leftovers, cities and event ids that are kept;
--          seconds that a user's state lives; seconds that a slice lives; planned, bits and hashes of a new slice
--          (planned 0: exposures are not kept here); the server's clock, seconds since the epoch
--       2: the suffix of the current slice's key
--       3: users end to end: lengths of the name, of the operations and of the records of cities (u32 each), then these.
--          The name stands before the suffix in all of the user's keys. Operations are end to end: kind (1 byte), hash
--          of the event's id (8, zeros: none), length (u32), payload
-- Returns the numbers of the operations that were left out because their event had been taken before; the call's first
-- operation is 0.
--
-- Keys of ids are never read as numbers: Lua's have 53 bits. docs/state.md describes the records. A call has many users
-- because the functions below are made anew for each. A long string costs the hash of all its bytes.

local unpack_from, pack, find, sub, rep = struct.unpack, struct.pack, string.find, string.sub, string.rep
local call, floor, min, max = redis.call, math.floor, math.min, math.max

local RECORD, NO_ID, NO_KIND = 24, '\0\0\0\0\0\0\0\0', '\0\0\0\0'
local GONE = '\255\255\255\255'
local WHOLE = 512 -- bytes of a link per exposure up to which it is cheaper to write the link than the bits
local SUFFIXES = {':e', ':p', ':d', ':f', ':r'}
local WITHOUT, WITH = 16777216, 33554432 -- leftovers: what stands behind the time in front of the event ids

local r_cap, f_cap, d_cap, c_cap, p_cap, e_cap, user_seconds, slice_seconds, planned, bits, hashes, now =
  unpack_from('<I4I4I4I4I4I4I4I4I4I4I4I4', ARGV[1])
local slice, users = ARGV[2], ARGV[3]

-- What is kept beyond the cap before the oldest are dropped together: dropping costs a pass over all.
local function most(cap) return cap + max(4, floor(cap / 4)) end

-- Renews the life of all that is kept of a user but exposures; returns whether there are leftovers.
local function renew(user)
  for each = 1, 5 do call('EXPIRE', user .. SUFFIXES[each], user_seconds) end
  return call('EXPIRE', user .. ':c', user_seconds) == 1
end

local function set(key, value, fresh)
  if fresh then call('SET', key, value, 'EX', user_seconds) else call('SET', key, value, 'KEEPTTL') end
end

-- Returns where `part` begins in `value`, at the beginning of a record of `size` bytes.
local function find_record(value, part, size)
  local at = find(value, part, 1, true)
  while at and (at - 1) % size ~= 0 do at = find(value, part, at + 1, true) end
  return at
end

-- Puts a record in the place of the one with the same key and kind unless that is newer, or behind the others.
local function put(key, cap, record)
  local value = call('GET', key)
  local fresh = value == false
  value = value or ''
  -- Behind the last record is room, all zeros.
  local room = #value / RECORD
  local n, high = 0, room
  while n < high do
    local middle = floor((n + high) / 2)
    if sub(value, middle * RECORD + 9, middle * RECORD + 12) == NO_KIND then high = middle else n = middle + 1 end
  end
  local place = find_record(value, sub(record, 1, 12), RECORD)
  if place then
    if unpack_from('<i8', record, 17) >= unpack_from('<i8', value, place + 16) then
      call('SETRANGE', key, place - 1, record)
    end
    return
  end
  if n < room then
    call('SETRANGE', key, n * RECORD, record)
    return
  end
  value, n = value .. record, n + 1
  if n <= most(cap) then
    room = min(most(cap), n + max(3, floor(n / 4)))
  else
    -- The newest stay, in their order; of one time the later ones are newer.
    local times, ordered, kept = {}, {}, {}
    for at = 1, n do
      local time = unpack_from('<i8', value, at * RECORD - 7)
      times[at], ordered[at] = time, time
    end
    table.sort(ordered)
    local limit, equal = ordered[n - cap], 0
    for at = n - cap, 1, -1 do
      if ordered[at] < limit then break end
      equal = equal + 1
    end
    for at = 1, n do
      if times[at] == limit and equal > 0 then
        equal = equal - 1
      elseif times[at] >= limit then
        kept[#kept + 1] = sub(value, at * RECORD - 23, at * RECORD)
      end
    end
    value, n, room = table.concat(kept), cap, most(cap)
  end
  set(key, value .. rep('\0', (room - n) * RECORD), fresh)
end

-- Puts hashes of event ids behind those that are there; behind the last one are zeros, and an id may end with some.
-- The first eight bytes, which are never zeros, are none.
local function remember(key, ids, new)
  local free = find(ids, NO_ID, 1, true)
  local n = free and math.ceil((free - 1) / 8) or #ids / 8
  local more = #new / 8
  if n + more <= #ids / 8 then
    call('SETRANGE', key, n * 8, new)
    return
  end
  local value, room = sub(ids, 1, n * 8) .. new, most(e_cap) + 1
  n = n + more
  if n > room then
    value, n = sub(value, 1, 8) .. sub(value, -8 * e_cap), e_cap + 1
  else
    room = min(room, n + max(3, floor(n / 4)))
  end
  set(key, value .. rep('\0', (room - n) * 8), #ids == 8)
end

-- The bits: docs/exposure-format.md. Exposures are two u32 each in `probes`; `command` sets up to sixteen bits and the
-- count, or reads bits.
local probes, squares, masks, byte = {}, {}, {[0] = 128, 64, 32, 16, 8, 4, 2, 1}, string.byte
local command, reading = {'BITFIELD', false, 'SET', 'u32', 64, 0}, {'BITFIELD', false}
for i = 0, 15 do
  squares[i] = i * i * 2654435769 % 4294967296
  command[4 * i + 7], command[4 * i + 8], command[4 * i + 10] = 'SET', 'u1', 1
  reading[3 * i + 3], reading[3 * i + 4] = 'GET', 'u1'
end

-- What BITFIELD, which is big-endian, must be told for a little-endian number to come out.
local function swapped(n) return (unpack_from('>I4', pack('<I4', n))) end

-- Where the newest of `links` links begins, how many bits it has, and how many exposures it takes.
local function newest_link(plan, per, links)
  local first = 64 * math.ceil(plan * per / 64)
  local base, size, capacity = 16, first, plan
  for number = 2, links do
    base = base + size / 8
    size = min(first * 2 ^ min(number - 1, 32), max(first, 1048576))
    capacity = max(1, floor(size / (2 * per)))
  end
  return base, size, capacity
end

-- Sets an exposure's bits in place and counts it, or (where `full`) only looks; returns whether all were set before.
local function set_in_place(key, each, k, base, size, count, full)
  local a, b = probes[2 * each - 1], probes[2 * each]
  local words, at, step = command, 9, 4
  if full then
    words, at, step = reading, 5, 3
  else
    words[6] = swapped(count + 1)
  end
  words[2] = key
  base = base * 8
  for i = 0, k - 1 do
    words[at + step * i] = base + floor((a + i * b + squares[i]) % 4294967296 * size / 4294967296)
  end
  local old = call(unpack(words, 1, at + step * k - 3))
  for i = #old - k + 1, #old do
    if old[i] == 0 then return false end
  end
  if not full then call('SETRANGE', key, 8, pack('<I4', count)) end
  return true
end

-- Sets exposures, from number `each` on, in a link that is read and written as a whole, until one finds it full. Returns
-- that one's number, or one more than all, and the count.
local function set_in_whole(key, each, shown, k, base, size, capacity, count, links)
  local link = call('GETRANGE', key, base, base + size / 8 - 1)
  -- Zeros at the end need not be there.
  local missing = size / 8 - #link
  if missing > 0 then link = link .. rep('\0', missing) end
  local changes, places = {}, {} -- byte -> new byte; which have changed
  while each <= shown do
    local a, b = probes[2 * each - 1], probes[2 * each]
    local all, full = true, count >= capacity
    for i = 0, k - 1 do
      local place = ((a + i * b + squares[i]) % 4294967296) * size / 4294967296
      place = place - place % 1
      local mask, at = masks[place % 8], (place - place % 8) / 8
      local old = changes[at] or byte(link, at + 1)
      if old % (2 * mask) < mask then
        all = false
        if full then break end
        if not changes[at] then places[#places + 1] = at end
        changes[at] = old + mask
      end
    end
    if not all then
      if full then break end
      count = count + 1
    end
    each = each + 1
  end
  if #places > 0 then
    local parts, done = {}, 0
    if base == 16 then parts[1] = pack('<I4I4', count, links) end
    table.sort(places)
    for _, at in ipairs(places) do
      parts[#parts + 1] = sub(link, done + 1, at)
      parts[#parts + 1] = string.char(changes[at])
      done = at + 1
    end
    parts[#parts + 1] = sub(link, done + 1)
    if base == 16 then -- the count stands right before
      call('SETRANGE', key, 8, table.concat(parts))
    else
      call('SETRANGE', key, base, table.concat(parts))
      call('SETRANGE', key, 8, pack('<I4', count))
    end
  end
  return each, count
end

-- Sets the bits of exposures; returns whether the value that is there can be used.
local function show(key, shown)
  local value = call('GETRANGE', key, 0, 15)
  local k, per, plan, count, links = hashes, bits, planned, 0, 1
  if value ~= '' then
    local version = 0
    if #value == 16 then version, k, per, plan, count, links = unpack_from('<BBI2I4I4I4', value) end
    local cells = plan * per
    if version ~= 1 or k < 1 or k > 16 or cells < 1 or cells > 1048576 or links < 1
        or (links > 16 and links > 16 + call('STRLEN', key) / 131072) then
      return false
    end
  end
  local base, size, capacity = newest_link(plan, per, links)
  if value == '' then -- at their full length values do not grow in place, which takes twice the memory
    call('SET', key, pack('<BBI2I4I4I4', 1, k, per, plan, 0, 1) .. rep(NO_ID, size / 64), 'EX', slice_seconds)
  end
  local each = 1
  while each <= shown do
    local before = each
    if size / 8 <= WHOLE * (shown - each + 1) then
      each, count = set_in_whole(key, each, shown, k, base, size, capacity, count, links)
    else
      local full = count >= capacity
      local all = set_in_place(key, each, k, base, size, count, full)
      if all or not full then each = each + 1 end
      if not all and not full then count = count + 1 end
    end
    if each == before then -- full: this exposure opens the next link
      links, count = links + 1, 0
      base, size, capacity = newest_link(plan, per, links)
      value = call('GET', key)
      value = value .. rep('\0', base + size / 8 - #value)
      call('SET', key, sub(value, 1, 8) .. pack('<I4I4', count, links) .. sub(value, 17), 'KEEPTTL')
    end
  end
  return true
end

local duplicates, number, sound = {}, -1, true

-- Applies the operations [at, last) and the records of cities [last, behind) of a user.
local function apply(user, at, last, behind)
  local key = user .. ':e'
  local ids = call('GET', key) or ''
  local known, fresh, left -- what comes new; leftovers, once they have been read
  local shown, there, flags = 0, ids ~= '', 0
  if there then
    local renewed
    renewed, flags = unpack_from('<I4I4', ids)
    if flags == WITHOUT then left = '' end
    -- The life of what is there is renewed when a 64th of it has gone by, not with every event.
    if math.abs(now - renewed) > user_seconds / 64 then
      renew(user)
      call('SETRANGE', key, 0, pack('<I4', now))
      ids = pack('<I4', now) .. sub(ids, 5)
    end
  elseif renew(user) then
    flags = WITH
  else
    flags, left = WITHOUT, ''
  end
  local had = flags

  local function mark(place, kind)
    call('SETRANGE', user .. ':c', place + 7, kind)
    left = sub(left, 1, place + 7) .. kind .. sub(left, place + 12)
  end

  while at < last do
    local kind, id, length = unpack_from('<Bc8I4', users, at)
    local first = at + 13
    at, number = first + length, number + 1
    local taken = false
    if id ~= NO_ID and e_cap > 0 then
      taken = find_record(ids, id, 8) or (fresh and known[id])
      if not taken and fresh then
        known[id] = true
        fresh[#fresh + 1] = id
      elseif not taken then
        known, fresh = {[id] = true}, {id}
      end
    end
    if taken then
      duplicates[#duplicates + 1] = number
    elseif kind == 5 then -- shown: gone from the leftovers, and a mark in the bits
      left = left or call('GET', user .. ':c') or ''
      for each = first, at - 1, 16 do
        if left ~= '' then
          local place = find_record(left, sub(users, each + 8, each + 15), RECORD)
          if place then mark(place, GONE) end
        end
        shown = shown + 1
        probes[2 * shown - 1], probes[2 * shown] = unpack_from('<I4I4', users, each)
      end
    elseif kind == 1 then
      put(user .. ':r', r_cap, sub(users, first, at - 1))
    elseif kind == 2 then
      put(user .. ':f', f_cap, sub(users, first, at - 1))
    elseif kind == 3 then
      put(user .. ':d', d_cap, sub(users, first, at - 1))
    elseif kind == 4 then -- left over: in front of those of before, an item once
      local old = left or call('GET', user .. ':c') or ''
      local kept, there = {}, {}
      for each = first, min(at, first + c_cap * RECORD) - 1, RECORD do
        there[sub(users, each, each + 7)] = true
        kept[#kept + 1] = sub(users, each, each + 23)
      end
      for each = 1, #old, RECORD do
        if #kept == c_cap then break end
        if not there[sub(old, each, each + 7)] and sub(old, each + 8, each + 11) ~= GONE then
          kept[#kept + 1] = sub(old, each, each + 23)
        end
      end
      left = old
      if #kept > 0 then
        left, flags = table.concat(kept), WITH
        set(user .. ':c', left, old == '')
      end
    end
  end

  for city = last, behind - 1, RECORD do put(user .. ':p', p_cap, sub(users, city, city + 23)) end
  if not there then
    ids = pack('<I4I4', now, flags)
    if not fresh then set(key, ids, true) end
  elseif flags ~= had then
    call('SETRANGE', key, 4, pack('<I4', flags))
    ids = sub(ids, 1, 4) .. pack('<I4', flags) .. sub(ids, 9)
  end
  if fresh then remember(key, ids, table.concat(fresh)) end
  if shown > 0 and planned > 0 and not show(user .. slice, shown) then sound = false end
end

-- A store that is out of memory refuses a write that may take some, unless the script has written before: to renew a life
-- is such a write, and takes none. So this one, which changes nothing, comes first.
call('SETRANGE', KEYS[1] .. ':c', 0, '')

local at = 1
while at <= #users do
  local name, operations, cities = unpack_from('<I4I4I4', users, at)
  local first = at + 12 + name
  at = first + operations + cities
  apply(sub(users, first - name, first - 1), first, first + operations, at)
end
if not sound then return redis.error_reply('ERR exposure bits that are damaged or of an unknown version') end
return duplicates
