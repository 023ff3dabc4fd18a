-- Applies what happened to one user, in order and as a whole. Runs on Redis 6 and later and on Valkey.
--
-- KEYS  recent actions, follows, dislikes, leftovers, cities, event ids, exposure bits of the current slice
-- ARGV  1: twelve u32: the most recent actions, follows, dislikes, leftovers, cities and event ids that are kept;
--          seconds that a user's state lives; seconds that a slice lives; planned, bits and hashes of a new slice
--          (planned 0: exposures are not kept here); 0
--       2: operations end to end: kind (1 byte), hash of the event's id (8, zeros: none), length (u32), payload
--       3: records of cities
-- Returns how many operations were left out because their event had been taken before.
--
-- Keys of ids are never read as numbers: Lua's have 53 bits. docs/state.md describes the records.

local unpack_from, pack, find, sub, rep = struct.unpack, struct.pack, string.find, string.sub, string.rep
local call, floor, min, max = redis.call, math.floor, math.min, math.max

local RECORD = 24
local NO_ID = rep('\0', 8)
local NO_KIND = rep('\0', 4)
local GONE = '\255\255\255\255'

local caps, user_seconds, slice_seconds, planned, bits, hashes = {}, nil, nil, nil, nil, nil
caps[1], caps[2], caps[3], caps[4], caps[5], caps[6], user_seconds, slice_seconds, planned, bits, hashes =
  unpack_from('<I4I4I4I4I4I4I4I4I4I4I4', ARGV[1])

-- What is kept beyond the cap before the oldest are dropped together: dropping costs a pass over all.
local function most(cap) return cap + max(4, floor(cap / 4)) end

-- The life of what is there is renewed when a 64th of it has gone by, not with every event. Event ids come first: most
-- users have them, so one question is enough.
local function renew()
  for at = 6, 1, -1 do
    local left = call('TTL', KEYS[at])
    if left ~= -2 then
      if left < user_seconds * 63 / 64 then
        for each = 1, 6 do call('EXPIRE', KEYS[each], user_seconds) end
      end
      return
    end
  end
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

-- Returns how many records of `size` bytes are in use: behind the last the bytes [first, last] of each are zeros.
local function used_of(value, size, first, last, zeros)
  local low, high = 0, #value / size
  while low < high do
    local middle = floor((low + high) / 2)
    if sub(value, middle * size + first, middle * size + last) == zeros then high = middle else low = middle + 1 end
  end
  return low
end

-- Returns the `cap` newest of n records, in their order; of one time the later ones are newer.
local function newest(value, n, cap)
  local times, ordered = {}, {}
  for at = 1, n do
    local time = unpack_from('<i8', value, at * RECORD - 7)
    times[at], ordered[at] = time, time
  end
  table.sort(ordered)
  local limit, drop, equal = ordered[n - cap], n - cap, 0
  for at = n - cap, 1, -1 do
    if ordered[at] < limit then break end
    equal = equal + 1
  end
  local kept = {}
  for at = 1, n do
    if times[at] > limit then
      kept[#kept + 1] = sub(value, at * RECORD - 23, at * RECORD)
    elseif times[at] == limit then
      if equal > 0 then equal = equal - 1 else kept[#kept + 1] = sub(value, at * RECORD - 23, at * RECORD) end
    end
  end
  return table.concat(kept)
end

local values, used, existed = {}, {}, {}

local function load(at)
  local value = call('GET', KEYS[at])
  existed[at] = value ~= false
  values[at] = value or ''
end

-- Puts a record in the place of the one with the same key and kind unless that is newer, or behind the others.
local function put(at, record)
  if not values[at] then
    load(at)
    used[at] = used_of(values[at], RECORD, 9, 12, NO_KIND)
  end
  local value, n, cap = values[at], used[at], caps[at]
  local place = find_record(value, sub(record, 1, 12), RECORD)
  if place then
    if unpack_from('<i8', record, 17) < unpack_from('<i8', value, place + 16) then return end
  elseif n < #value / RECORD then
    place = n * RECORD + 1
    used[at] = n + 1
  end
  if place then
    call('SETRANGE', KEYS[at], place - 1, record)
    values[at] = nil -- to be read again: long strings are dear here
    return
  end
  value, n = sub(value, 1, n * RECORD) .. record, n + 1
  local room = min(most(cap), n + max(3, floor(n / 4)))
  if n > most(cap) then
    value, n, room = newest(value, n, cap), cap, most(cap)
  end
  values[at], used[at] = value .. rep('\0', (room - n) * RECORD), n
  set(KEYS[at], values[at], not existed[at])
  existed[at] = true
end

local function leave_over(records)
  if not values[4] then load(4) end
  local kept, there, old = {}, {}, values[4]
  for at = 1, #records, RECORD do
    if #kept == caps[4] then break end
    there[sub(records, at, at + 7)] = true
    kept[#kept + 1] = sub(records, at, at + 23)
  end
  for at = 1, #old, RECORD do
    if #kept == caps[4] then break end
    if not there[sub(old, at, at + 7)] and sub(old, at + 8, at + 11) ~= GONE then
      kept[#kept + 1] = sub(old, at, at + 23)
    end
  end
  if #kept == 0 then return end
  values[4] = table.concat(kept)
  set(KEYS[4], values[4], not existed[4])
  existed[4] = true
end

local function mark(place, kind)
  call('SETRANGE', KEYS[4], place + 7, kind)
  values[4] = sub(values[4], 1, place + 7) .. kind .. sub(values[4], place + 12)
end

local function recall(keys)
  if not values[4] then load(4) end
  for at = 1, #keys, 8 do
    local place = find_record(values[4], sub(keys, at, at + 7), RECORD)
    if place then
      local kind = unpack_from('<I4', values[4], place + 8)
      if kind < 4294967294 then mark(place, pack('<I4', kind + 1)) end
    end
  end
end

-- Exposures wait for the end: their bits are set together. Each is two u32 to probe with.
local probes, shown = {}, 0

local function expose(payload)
  if not values[4] then load(4) end
  for at = 1, #payload, 16 do
    if values[4] ~= '' then
      local place = find_record(values[4], sub(payload, at + 8, at + 15), RECORD)
      if place then mark(place, GONE) end
    end
    if planned > 0 then
      shown = shown + 1
      probes[2 * shown - 1], probes[2 * shown] = unpack_from('<I4I4', payload, at)
    end
  end
end

local words = {}

-- Runs a BITFIELD over the probes of exposures [first, last] in a link; returns a bit for each, as it was before.
local function bitfield(what, hashes, first, last, base, size)
  local n = 2
  words[1], words[2] = 'BITFIELD', KEYS[7]
  for at = first, last do
    local a, b = probes[2 * at - 1], probes[2 * at]
    for i = 0, hashes - 1 do
      local x = (a + i * b + i * i * 2654435769) % 4294967296
      words[n + 1], words[n + 2], words[n + 3] = what, 'u1', base * 8 + floor(x * size / 4294967296)
      n = n + 3
      if what == 'SET' then
        n = n + 1
        words[n] = 1
      end
    end
  end
  return call(unpack(words, 1, n))
end

-- Whether all bits of the exposure that has the replies from `first` on are set.
local function all_set(replies, first, hashes)
  for at = first, first + hashes - 1 do
    if replies[at] == 0 then return false end
  end
  return true
end

local function set_bits()
  local key = KEYS[7]
  local header = call('GETRANGE', key, 0, 15)
  local k, per, plan, count, links = hashes, bits, planned, 0, 1
  if header ~= '' then
    local version
    version, k, per, plan, count, links = unpack_from('<BBI2I4I4I4', header)
    if version ~= 1 then return redis.error_reply('ERR exposure bits of an unknown version') end
    local cells = plan * per
    if k < 1 or k > 16 or cells < 1 or cells > 1048576 or links < 1
        or (links > 16 and links > 16 + call('STRLEN', key) / 131072) then
      return redis.error_reply('ERR exposure bits with a damaged header')
    end
  end
  local first_size = 64 * math.ceil(plan * per / 64)
  local function size_of(link)
    if link == 1 then return first_size end
    return min(first_size * 2 ^ min(link - 1, 32), max(first_size, 1048576))
  end
  local function capacity_of(link)
    if link == 1 then return plan end
    return max(1, floor(size_of(link) / (2 * per)))
  end
  if header == '' then
    header = pack('<BBI2I4I4I4', 1, k, per, plan, count, links)
    call('SET', key, header .. rep('\0', first_size / 8), 'EX', slice_seconds)
  end
  local base = 16
  for link = 1, links - 1 do base = base + size_of(link) / 8 end
  local size, capacity = size_of(links), capacity_of(links)
  local had, had_links, at = count, links, 1
  while at <= shown do
    if count < capacity then
      local last = min(shown, at + capacity - count - 1, at + 31)
      local replies = bitfield('SET', k, at, last, base, size)
      for each = at, last do
        if not all_set(replies, (each - at) * k + 1, k) then count = count + 1 end
      end
      at = last + 1
    elseif all_set(bitfield('GET', k, at, at, base, size), 1, k) then
      at = at + 1
    else
      base = base + size / 8
      links, count = links + 1, 0
      size, capacity = size_of(links), capacity_of(links)
      -- The whole value once more: growing in place would take twice the memory.
      local value = call('GET', key)
      call('SET', key, value .. rep('\0', base + size / 8 - #value), 'KEEPTTL')
    end
  end
  if count ~= had or links ~= had_links then call('SETRANGE', key, 8, pack('<I4I4', count, links)) end
end

local ids, known, fresh = nil, {}, {}

-- Whether an event was taken before; from now on it was.
local function taken(id)
  if id == NO_ID or caps[6] == 0 then return false end
  if not ids then ids = call('GET', KEYS[6]) or '' end
  if known[id] or find_record(ids, id, 8) then return true end
  known[id] = true
  fresh[#fresh + 1] = id
  return false
end

local function remember()
  local n, limit, new = used_of(ids, 8, 1, 8, NO_ID), most(caps[6]), table.concat(fresh)
  if n + #fresh <= #ids / 8 then
    call('SETRANGE', KEYS[6], n * 8, new)
    return
  end
  local value, room = sub(ids, 1, n * 8) .. new, limit
  n = n + #fresh
  if n > limit then
    value, n = sub(value, -8 * caps[6]), caps[6]
  else
    room = min(limit, n + max(3, floor(n / 4)))
  end
  set(KEYS[6], value .. rep('\0', (room - n) * 8), ids == '')
end

renew()
local duplicates, operations, at = 0, ARGV[2], 1
while at <= #operations do
  local kind, id, length = unpack_from('<Bc8I4', operations, at)
  local first = at + 13
  at = first + length
  if taken(id) then
    duplicates = duplicates + 1
  else
    local payload = sub(operations, first, at - 1)
    if kind <= 3 then put(kind, payload)
    elseif kind == 4 then leave_over(payload)
    elseif kind == 5 then recall(payload)
    else expose(payload) end
  end
end
for city = 1, #ARGV[3], RECORD do put(5, sub(ARGV[3], city, city + 23)) end
if #fresh > 0 then remember() end
if shown > 0 then
  local refused = set_bits()
  if refused then return refused end
end
return duplicates
