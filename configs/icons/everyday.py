"""The subjects of the CPU runs: common things that most icon sets include, by their names in the icons set."""

_NAMES = """
Christmas tree, airplane, alarm clock, automobile, backpack, balloon, banana, basketball, bear, bed, bell, bicycle,
birthday cake, blue book, bus, butterfly, cactus, camera, candle, carrot, castle, cat, chair, cherries, chicken,
church, closed book, cloud, cloud with rain, cow face, crab, crescent moon, croissant, crown, cupcake, dog, dolphin,
doughnut, drum, duck, elephant, factory, ferris wheel, fire, fire engine, fish, fox, french fries, grapes, green
book, guitar, hamburger, hammer, helicopter, high-heeled shoe, honeybee, horse, hot beverage, house, jack-o-lantern,
key, kite, laptop, lemon, light bulb, lion, locomotive, mobile phone, motorcycle, mountain, necktie, octopus, owl,
palm tree, panda, pen, pencil, penguin, pig face, pineapple, pizza, rabbit, rainbow, red apple, rocket, rose,
running shoe, sailboat, scissors, shark, ship, snail, snake, snowflake, snowman, soccer ball, soft ice cream,
spider, star, strawberry, sun, sunflower, sunglasses, t-shirt, teddy bear, telephone, television, tent, tiger face,
tomato, top hat, tractor, trumpet, tulip, turtle, umbrella, unicorn, violin, volcano, watermelon, whale, wrapped
gift, wrench
"""
SUBJECTS = tuple(" ".join(_NAMES.split()).split(", "))
